"""Sections of `check_gpu.py`: each measures one thing on one device and gives a row for everything it finds."""

import asyncio
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_setup import (
    MICROBATCH_TOKENS,
    SHAPES,
    LeftOut,
    Setup,
    clear,
    draw,
    drawn,
    learner,
    on_cpu,
    peak_bytes,
    policy,
    requests,
    rollouts,
    seconds,
)

from farflung.engine import noise
from farflung.engine.base import Completion, Request
from farflung.engine.local import LocalEngine
from farflung.learner.pack import MicroBatch, pack
from farflung.learner.policy import Policy
from farflung.numerics.devices import name_of
from farflung.protocol.identity import Key
from farflung.trust.evidence import TIE
from farflung.weights.publish import Publisher, weights_digest

ROOT = Path(__file__).parents[1]
RUN_S = 300.0
"""The longest that the whole run may take."""
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 1.0}
"""Nats by which the score of a sent token may lie below the best one: several times the rounding of either type."""
Said = list[tuple[Request, Completion]]


class Row(NamedTuple):
    """One finding."""

    what: str
    found: str
    value: float | None = None
    """The figure in `found`, for machines."""
    holds: bool | None = None
    """Whether what must hold did; None where nothing must."""


def noise_parity(setup: Setup) -> Iterator[Row]:
    """The seeded noise has the CPU's bits, and how long a decoding step of it takes."""
    seeds, places, vocab = [7, 2**63 + 5, 9], [0, 4, 131_071], SHAPES[0].vocab
    here = noise.bits(seeds, places, vocab, setup.device).cpu().numpy().view(np.uint32)
    wrong = int((here != noise.bits_numpy(seeds, places, vocab)).sum())
    yield Row(f"hash bits of 3 rows of {vocab:,} tokens", f"{wrong} differ from the CPU's", wrong, wrong == 0)
    far = noise.gumbel(seeds, places, vocab, setup.device).cpu() - noise.gumbel(seeds, places, vocab)
    most = float(far.abs().max())
    yield Row("the noise made of them", f"at most {most:.1e} from the CPU's, {TIE:.0e} is a tie", most, most <= TIE)
    rows = setup.amounts.rows[-1]
    make = partial(noise.gumbel, list(range(rows)), [5] * rows, vocab, setup.device)
    make()
    took = 1e3 * seconds(setup.device, make)
    yield Row(f"noise of a decoding step of {rows} rows of {vocab:,}", f"{took:.2f} ms", took)


def decode(setup: Setup) -> Iterator[Row]:
    """Tokens a second of the local engine, prompts included."""
    engine = LocalEngine(drawn(setup, setup.dtype), eos_ids=())
    new = setup.amounts.new
    engine.generate(requests(setup, 2, 2))
    for rows in setup.amounts.rows:
        engine.max_rows = rows
        rate = rows * new / seconds(setup.device, partial(engine.generate, requests(setup, rows, new)))
        what = f"{rows} answers of {new} tokens at once to prompts of 64, {name_of(setup.dtype)}"
        yield Row(what, f"{rate:,.0f} tokens/s", rate)


def replay(setup: Setup) -> Iterator[Row]:
    """Tokens a second of a validator's replay, of long answers and of a group's."""
    engine = LocalEngine(drawn(setup, setup.dtype), eos_ids=())
    read, rng = setup.amounts.read, np.random.default_rng(3)
    (long,), (shared,) = requests(setup, 1, read), requests(setup, 1, read // 16)
    for request, count, size in ((long, 2, read), (shared, 16, read // 16)):
        ids = rng.integers(5, setup.shape.vocab, (count, size)).tolist()
        items = [(request, tuple(one)) for one in ids]
        engine.replay(items[:1])
        rate = count * size / seconds(setup.device, partial(engine.replay, items))
        what = f"{count} answers of {size:,} tokens to one prompt, {name_of(setup.dtype)}"
        yield Row(what, f"{rate:,.0f} tokens/s", rate)


def flips(setup: Setup) -> Iterator[Row]:
    """Tokens that a replay would have picked otherwise, decode against prefill and this device against the CPU."""
    for dtype in TOLERANCE:
        engine = LocalEngine(drawn(setup, dtype), eos_ids=())
        for rows in sorted({1, 7, setup.amounts.judged}):
            engine.max_rows = rows
            asked = requests(setup, rows, setup.amounts.new // 2, 16)
            said = [(request, one) for request, one in zip(asked, engine.generate(asked), strict=True) if one]
            yield agreement(f"{name_of(dtype)}, decoded {rows} at once, against prefill here", engine, said, dtype)
        judge = on_cpu(engine, setup.shape)
        yield agreement(f"{name_of(dtype)}, the last of these, against the CPU in float32", judge, said, dtype)
        del engine, judge
        clear(setup.device)


def agreement(what: str, judge: LocalEngine, said: Said, dtype: torch.dtype) -> Row:
    """How many tokens the judge would have picked otherwise, and by how much the worst one; that must be rounding."""
    replays = judge.replay([(request, one.ids) for request, one in said])
    margin = np.concatenate([one.margin for one in replays])
    apart = np.concatenate([seen.logp - one.logp for seen, (_, one) in zip(replays, said, strict=True)])
    flipped, worst = int((margin > TIE).sum()), float(margin.max())
    text = (
        f"{flipped} of {len(margin)} tokens differ, the worst by {worst:.2g} nats ({TOLERANCE[dtype]:g} may be); "
        f"log-probabilities by {np.abs(apart).mean():.1e}"
    )
    return Row(what, text, flipped / len(margin), worst <= TOLERANCE[dtype])


def exact(setup: Setup) -> Iterator[Row]:
    """Whether two steps of a learner come to the same weights each time they are taken, three times."""
    own = policy(setup)
    for layout, is_shared in (("completions that share a row", True), ("one completion a row", False)):
        batch = pack(rollouts(setup, 2, setup.amounts.new), MICROBATCH_TOKENS, is_shared=is_shared)
        for is_strict in (False, True):
            what = f"{layout}, warn_only={not is_strict}"
            try:
                count = len({_trained(own, batch, is_strict=is_strict) for _ in range(3)})
            except RuntimeError as error:
                yield Row(what, f"refused: {_first_line(error)}")
                continue
            yield Row(what, "the same weights each time" if count == 1 else f"{count} different weights", count)


def _trained(policy: Policy, batch: Sequence[MicroBatch], *, is_strict: bool) -> str:
    """The digest of a policy's weights two steps after it was drawn anew."""
    draw(policy.model)
    own = learner(policy)
    own.determinism.is_strict = is_strict
    own.step(batch)
    own.step(batch)
    if own.determinism.is_strict != is_strict:
        raise RuntimeError("an operation has no deterministic kernel; the log names it")
    return weights_digest(policy.tensors())


def step(setup: Setup) -> Iterator[Row]:
    """Time and memory of a step of the learner, the second one, when moments are there."""
    own = learner(policy(setup))
    batch = pack(rollouts(setup, 1, setup.amounts.trained), MICROBATCH_TOKENS)
    fed = sum(micro.rows.ids_RW.numel() for micro in batch)
    own.step(batch)
    clear(setup.device)
    took = seconds(setup.device, partial(own.step, batch))
    yield Row(f"a step of {fed:,} tokens, checkpointed", f"{took:.2f} s, {fed / took:,.0f} tokens/s", took)
    found, expected = peak_bytes(setup.device), setup.shape.step_bytes(fed)
    text = f"{found / 1e9:.2f} GB, by arithmetic {expected / 1e9:.2f} GB"
    yield Row("memory of that step", text, found / expected)


class _Counted:
    """A client that counts what is uploaded and sends it nowhere."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    async def put(self, path: str, data: bytes) -> None:
        self.sent_bytes += len(data)


def publish(setup: Setup) -> Iterator[Row]:
    """How fast weights are rounded, copied from the device, hashed and encoded, whole and as a difference."""
    own, counted = learner(policy(setup)), _Counted()
    publisher: Any = Publisher(counted, Key.make(), "check", 1000)  # type: ignore[arg-type]
    batch = pack(rollouts(setup, 1, setup.amounts.new), MICROBATCH_TOKENS)
    size = 2 * setup.shape.parameters
    for number, what in enumerate(("whole", "as a difference, after a step of lr 1e-5")):
        before = counted.sent_bytes
        send = partial(
            publisher.publish, own.policy.tensors(), step=number + 1, parent="", commitment="0" * 64, now=0.0
        )
        took = seconds(setup.device, lambda send=send: asyncio.run(send()))
        sent = counted.sent_bytes - before
        yield Row(what, f"{took:.1f} s for {size / 1e9:.2f} GB, {sent / 1e9:.3f} GB to send", size / took / 1e9)
        own.step(batch)


def whole_run(setup: Setup) -> Iterator[Row]:
    """A run of two steps of the demo's model with trainer, validator and worker on the device."""
    if setup.device.type == "far":
        raise LeftOut("the second device is in this process alone, a run has several")
    with tempfile.TemporaryDirectory(prefix="farflung-check-") as scratch:
        took = seconds(setup.device, partial(_run, Path(scratch), str(setup.device)))
        folder = Path(scratch) / "check"
        summary = json.loads((folder / "summary.json").read_text())
        here = sum(_computes_on(path, setup.device) for path in (folder / "logs").glob("*.log"))
    names = "steps", "rollouts_accepted", "rollouts_rejected", "honest_ejected"
    steps, accepted, rejected, ejected = (summary[name] for name in names)
    text = (
        f"{steps} of 2 steps in {took:.0f} s, {accepted} rollouts accepted, {rejected} rejected, {here} of 3 roles here"
    )
    holds = (steps, rejected, ejected, here) == (2, 0, 0, 3)
    yield Row("farflung run: examples/base, trainer, validator and worker on it", text, took, holds)


def _run(scratch: Path, device: str) -> None:
    """`farflung run`, its words among ours."""
    config = {
        "run": {"name": "check", "dir": str(scratch), "steps": 2, "reproducible": True},
        "model": {"path": str(ROOT / "examples" / "base")},
        "env": {"name": "sums", "train_tasks": 256, "eval_tasks": 8},
        "generate": {"samples": 8, "max_new_tokens": 32},
        "learn": {"groups": 2, "lr": 3e-4, "device": device},
        "validator": {"device": device},
        "worker": {"device": device, "slots": 32},
        "eval": {"tasks": 0},
        "trust": {"probation_rollouts": 8},
        "swarm": {"workers": 1},
    }
    path = scratch / "check.json"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "farflung", "run", str(path), "--plain"]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        timer = threading.Timer(RUN_S, process.kill)
        timer.start()
        for line in process.stdout or ():
            sys.stderr.write(line)
            last = line.strip() or last
        timer.cancel()
    if process.returncode:
        raise RuntimeError(f"farflung run ended with {process.returncode}: {last}")


def _computes_on(log: Path, device: torch.device) -> bool:
    return f"computes on={device} " in log.read_text(errors="replace")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


SECTIONS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "noise": noise_parity,
    "decode": decode,
    "replay": replay,
    "flips": flips,
    "exact": exact,
    "step": step,
    "publish": publish,
    "run": whole_run,
}


def measured(section: Callable[[Setup], Iterator[Row]], setup: Setup) -> Iterator[Row]:
    """The rows of a section; one that fails, or cannot be measured here, says so in its last row."""
    try:
        yield from section(setup)
    except LeftOut as why:
        yield Row("the rest", f"left out: {why}")
    except Exception as error:  # noqa: BLE001 - the other sections are to be measured too
        yield Row("the rest", f"failed: {_first_line(error)}", holds=False)
    clear(setup.device)
