"""What verification proves and what it costs: honest nodes across numerics, cheats on a real model, audits' price.

Prints one JSON object as its last line. Honest rollouts are generated in one arithmetic and replayed in another;
profiles are calibrated on the first policy, judged on the last one and on the hardest third of its tasks. Pairs count
where at least 1 % of the tokens are not the verifier's arg-max: the demo's model is too sure of itself for that, so a
model of its shape with 1,024 tokens and random weights, whose near-ties are as common as SmolLM2's, gives the mass of
the rollouts; it is trained on its own likeliest answers between its first policy and its last.
`--quick` takes a twentieth of the tokens; the full command is `python bench/verification.py`.
SmolLM2 parts need models/smollm2-135m (scripts/get_smollm2.py); the last
policies need finished runs (`--run DIR` of the demo's model, `--smol DIR`), else the base models stand for both.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from farflung.audits.tripwire import tripped
from farflung.engine.argmax import policy_scores
from farflung.engine.base import Request
from farflung.engine.cpu import decode
from farflung.engine.loading import build
from farflung.engine.local import LocalEngine
from farflung.envs.sums import Sums
from farflung.learner import checkpoint
from farflung.numerics.quantise import is_quantised, quantised
from farflung.protocol.numerics import Numerics, Quantiser
from farflung.tasks.create_run import Model
from farflung.trust import bounds, evidence
from farflung.trust.audit_policy import audit_probability
from farflung.trust.evidence import Profile, Seen
from farflung.trust.record import Finding, NodeRecord, TrustSettings, confirm, fold, submitted

ROOT = Path(__file__).parents[1]
TOY, SMOL = ROOT / "examples" / "base", ROOT / "models" / "smollm2-135m"
SIZE = 16
"""Rollouts per submission."""
SMOL_ROLLOUTS = 2000
SETTINGS = TrustSettings()
Tensors = dict[str, torch.Tensor]
DTYPES = {"torch-cpu-fp32": torch.float32, "torch-cpu-bf16": torch.bfloat16}
"""What each kind of arithmetic is computed in."""
TOLERANCE = {"torch-cpu-fp32": 2e-4, "torch-cpu-bf16": 2e-3}
"""Score noise that a profile of each forgives whatever was seen, as `farflung calibrate` has it."""
BF16 = Numerics(engine="torch", device="cpu", arithmetic="bfloat16", bits=16)


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")


# --- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How a node computes: the kind of arithmetic, what its weights go through, rows at once, threads."""

    profile: str
    rows: int = 64
    threads: int = 1
    quantiser: Quantiser = ""

    @property
    def name(self) -> str:
        made = f"{self.profile}-{self.quantiser}" if self.quantiser else self.profile
        return f"{made} x{self.rows}" + (f" {self.threads} threads" if self.threads > 1 else "")


def tensors(folder: Path) -> Tensors:
    """What would be published of a model or a checkpoint: bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}


def engine(folder: Path, weights: Tensors, kind: Kind, eos: Sequence[int]) -> LocalEngine:
    dtype = DTYPES[kind.profile]
    found = LocalEngine.from_folder(folder, dtype=dtype, threads=1, eos_ids=eos, max_rows=kind.rows)
    found.load(quantised(weights.items(), kind.quantiser))
    return found


def play(
    generator: LocalEngine,
    verifier: LocalEngine,
    asked: Sequence[Request],
    *,
    threads: int = 1,
    sent: Callable[[Request], Request] = lambda request: request,
    edit: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda ids: ids,
    noise: list[np.ndarray] | None = None,
) -> Iterator[Seen]:
    """What a verifier sees of what a generator made of these requests; a cheat generates from `sent`, or edits.

    `noise`, if given, gets by how much both sides' log-probabilities of each honest rollout differ.
    """
    for start in range(0, len(asked), 256):
        part = asked[start : start + 256]
        torch.set_num_threads(threads)
        done = generator.generate([sent(request) for request in part])
        torch.set_num_threads(1)
        made = [(request, item) for request, item in zip(part, done, strict=True) if item is not None]
        replays = verifier.replay([(request, edit(item.ids)) for request, item in made])
        if noise is not None:
            noise.extend(np.array(item.logp) - again.logp for (_, item), again in zip(made, replays, strict=True))
        yield from (Seen(replay.gap, replay.margin, replay.pick, replay.lead) for replay in replays)


def calibrated(name: str, *played: Any, tolerance: float = 2e-3, **tricks: Any) -> tuple[Profile, list[Seen]]:
    """The profile that honest rollouts give (`play` gets the rest), and what the verifier saw of them."""
    noise: list[np.ndarray] = []
    known = list(play(*played, noise=noise, **tricks))
    about = {"numerics": BF16, "verified_in": ["float32"]}
    return bounds.calibrate(name, known, noise=np.concatenate(noise), tolerance=tolerance, **about), known


def findings(profile: Profile, seen: Sequence[Seen]) -> list[Finding]:
    return [
        Finding("r", len(one.gap), evidence.flips(one), tuple(evidence.log_ratios(profile, one).tolist()))
        for one in seen
    ]


# --- honest ----------------------------------------------------------------------------------------------------------


def requests(rng: np.random.Generator, prompts: Sequence[tuple[int, ...]], count: int, t: float, max_new_tokens: int):
    chosen = rng.integers(0, len(prompts), count)
    seeds = rng.integers(0, 2**63, count)
    return [Request(prompts[i], int(seed), t, max_new_tokens) for i, seed in zip(chosen, seeds, strict=True)]


def policies_of(base: Path, run: Path | None) -> tuple[Tensors, Tensors]:
    """The first policy of a run of a base model, and the last one if the run is at hand."""
    found = checkpoint.latest(run / "checkpoints") if run else None
    return tensors(base), tensors(found.path if found else base)


def toy_prompts(model: Model, part: slice) -> list[tuple[int, ...]]:
    """Sums, ranked by length and digits; the hardest third comes last."""
    env = Sums()
    tasks = [task for task, _ in zip(env.tasks("train"), range(1536), strict=False)]
    texts = sorted(
        (env.prompt(task) for task in tasks), key=lambda text: (len(text), sum(map(int, filter(str.isdigit, text))))
    )
    return [tuple(model.prompt_ids(text)) for text in texts][part]


PAIRS = (
    (Kind("torch-cpu-bf16"), "torch-cpu-fp32", 1.0),
    (Kind("torch-cpu-fp32"), "torch-cpu-bf16", 1.0),
    (Kind("torch-cpu-bf16", quantiser="int8"), "torch-cpu-fp32", 0.45),
    (Kind("torch-cpu-bf16", quantiser="fp8"), "torch-cpu-fp32", 0.45),
    (Kind("torch-cpu-bf16", quantiser="int4"), "torch-cpu-fp32", 0.45),
    (Kind("torch-cpu-bf16", rows=7), "torch-cpu-fp32", 0.2),
    (Kind("torch-cpu-bf16", threads=2), "torch-cpu-fp32", 0.15),
)
"""Generator, the arithmetic of its verifier (never the same), which quantises as it does, and how many rollouts of it,
few rows being slow."""


def honest(folder: Path, first: Tensors, last: Tensors, shapes: dict[str, Any], rng: np.random.Generator) -> dict:
    """Every pair: calibrated on the first policy, judged on the last. Gives figures and the e-values of submissions."""
    eos = shapes["eos"]
    rows: list[dict[str, Any]] = []
    e_values: list[np.ndarray] = []
    ejected = rollouts = tokens = 0
    for kind, against, share in shapes["pairs"]:
        judge = Kind(against, quantiser=kind.quantiser)
        verifier_of = {id(w): engine(folder, w, judge, eos) for w in (first, last)}
        generator_of = {id(w): engine(folder, w, kind, eos) for w in (first, last)}
        max_new_tokens, t = shapes["max_new_tokens"], shapes["temperature"]
        asked = requests(rng, shapes["easy"], int(shapes["calibrate"] * share), t, max_new_tokens)
        pair = generator_of[id(first)], verifier_of[id(first)]
        profile, _ = calibrated(kind.name, *pair, asked, threads=kind.threads)
        asked = requests(rng, shapes["hard"], int(shapes["judge"] * share), t, max_new_tokens)
        seen = list(play(generator_of[id(last)], verifier_of[id(last)], asked, threads=kind.threads))
        found = findings(profile, seen)
        record, trips = NodeRecord(), 0
        for start in range(0, len(found) - SIZE + 1, SIZE):
            part = found[start : start + SIZE]
            total = evidence.submission_log_ratios([np.array(one.log_ratios) for one in part])
            e_values.append(evidence.e_values(total))
            record, outcome = fold(record, part, SETTINGS)
            trips += bool(tripped((str(start), np.array(one.log_ratios)) for one in part))
            if outcome.kind == "quarantine":
                record, outcome = confirm(record, part, SETTINGS)
                ejected += outcome.kind == "eject"
        count = sum(one.tokens for one in found)
        flips = sum(one.flips for one in found)
        rollouts, tokens = rollouts + len(found), tokens + count
        rows.append({"generator": kind.name, "verifier": against, "rollouts": len(found), "tokens": count,
                     "flipped": round(flips / count, 5),
                     "worst_log10_m": round(math.log10(max(record.statistic, 1e-300)), 1),
                     "voided": record.bad_submissions, "calibrated_on": profile.honest.tokens,
                     "far": round(profile.far, 2), "counts": flips >= 0.01 * count,
                     "tripwire_drop": trips / max(1, len(found) // SIZE)})  # fmt: skip
        say(f"honest {folder.name}: {rows[-1]}")
    return {"rows": rows, "e": e_values, "ejected": ejected, "rollouts": rollouts, "tokens": tokens}


# --- a model with many near-ties -------------------------------------------------------------------------------------

WIDE_VOCAB, WIDE_EOS, POLICIES, UPDATES = 1024, [2], 3, 5


def wide(folder: Path, rng: np.random.Generator) -> list[Tensors]:
    """Write config.json of a random model of the demo's shape into a folder; its first policy and later ones."""
    config = json.loads((TOY / "config.json").read_text()) | {"vocab_size": WIDE_VOCAB}
    (folder / "config.json").write_text(json.dumps(config))
    made = torch.Generator().manual_seed(20261124)
    model = build(folder, torch.float32)
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 2:
            tensor.normal_(0, 0.25 if "embed" in name else 0.12, generator=made)
    found = [published(model)]
    for _ in range(POLICIES - 1):
        sharpen(model, folder, rng)
        found.append(published(model))
    save_file(found[-1], folder / "model.safetensors")
    return found


def published(model: torch.nn.Module) -> Tensors:
    """What would be published of it, tied twins once."""
    twins: dict[int, str] = {}
    named = {name: t for name, t in model.state_dict(keep_vars=True).items() if twins.setdefault(id(t), name) == name}
    return {name: tensor.detach().bfloat16() for name, tensor in named.items()}


def sharpen(model: Any, folder: Path, rng: np.random.Generator) -> None:
    """A few updates towards the likelier half of its own answers."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(UPDATES):
        maker = engine(folder, published(model), Kind("torch-cpu-fp32"), WIDE_EOS)
        asked = requests(rng, wide_prompts(rng, 64), 64, 1.0, 24)
        said = [(request, done) for request, done in zip(asked, maker.generate(asked), strict=True) if done is not None]
        said.sort(key=lambda pair: -statistics.fmean(pair[1].logp))
        rows = [torch.tensor(request.prompt_ids + done.ids) for request, done in said[:32]]
        loss = sum(model(input_ids=row[None], labels=row[None]).loss for row in rows) / len(rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)


def wide_prompts(rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rng.integers(3, WIDE_VOCAB, (count, 8)).tolist()]


def by_difficulty(folder: Path, weights: Tensors, rng: np.random.Generator, count: int) -> list[tuple[int, ...]]:
    """Prompts, those last to which the policy is least sure of its answer."""
    prompts = wide_prompts(rng, count)
    maker = engine(folder, weights, Kind("torch-cpu-fp32"), WIDE_EOS)
    said = maker.generate([Request(prompt, i, 1.0, 12) for i, prompt in enumerate(prompts)])
    sure = [statistics.fmean(done.logp) if done else 0.0 for done in said]
    return [prompts[i] for i in np.argsort(sure)[::-1]]


def lives(e: np.ndarray, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """The highest M of `count` honest keys whose audited submissions are drawn from those that were measured."""
    highest, m = np.zeros(count), np.zeros((count, e.shape[1]))
    for k in range(1, length + 1):
        m = e[rng.integers(0, len(e), count)] * (m + 1 / (k * (k + 1)))
        highest = np.maximum(highest, m.mean(axis=1))
    return highest


# --- cheats ----------------------------------------------------------------------------------------------------------


def cheats(weights: Tensors, vocab: int, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Name → what it changes: weights, profile, request or text."""

    def shaken(scale: float, only: str = "") -> Tensors:
        made = torch.Generator().manual_seed(1)
        return {
            name: (t.float() * (1 + scale * torch.randn(t.shape, generator=made))).bfloat16() if only in name else t
            for name, t in weights.items()
        }

    def edited(ids: tuple[int, ...]) -> tuple[int, ...]:
        changed = rng.random(len(ids)) < 0.01
        changed[-1] = False  # the end stays the end
        return tuple(int(rng.integers(3, vocab)) if c else i for c, i in zip(changed, ids, strict=True))

    def tempered(t: float) -> Callable[[Request], Request]:
        return lambda request: replace(request, temperature=request.temperature * t)

    other = {"sent": lambda request: replace(request, seed=int(rng.integers(0, 2**63)))}
    stale = {name: (t.float() - 1e-5 * t.float().sign()).bfloat16() for name, t in weights.items()}
    return {
        "unseeded": other,
        "int4 weights": {"weights": dict(quantised(weights.items(), "int4"))},
        "temperature 0.9": {"sent": tempered(0.9)},
        "temperature 1.1": {"sent": tempered(1.1)},
        "1 % of tokens edited": {"edit": edited},
        "weights with 1 % noise": {"weights": shaken(0.01)},
        "one layer with 10 % noise": {"weights": shaken(0.1, ".layers.14.mlp.down_proj")},
        "int8 undeclared, in bf16": {"weights": dict(quantised(weights.items(), "int8"))},
        "stale by a step of 1e-5": {"weights": stale},
    }


def replayed(part: Sequence[Finding]) -> list[Finding]:
    """What a validator replays of a submission (`farflung.audits.replay_audits.more`): until it is decided, one by one
    what a cheat explains better, else as many again.
    """
    count = 1
    while count < len(part):
        total = evidence.submission_log_ratios([np.array(one.log_ratios) for one in part[:count]])
        if not (more := evidence.further(total, count)):
            return list(part[:count])
        count += more
    return list(part)


def until_caught(submissions: Callable[[], list[Finding]], most: int = 400) -> tuple[int, int] | None:
    """(submissions, tokens) of a new node until it is ejected, every rollout audited; nothing if it never is."""
    record, tokens = NodeRecord(), 0
    for number in range(1, most + 1):
        part = replayed(submissions())
        tokens += sum(one.tokens for one in part)
        record, outcome = fold(record, part, SETTINGS)
        if outcome.kind == "quarantine":
            record, outcome = confirm(record, part, SETTINGS)
            if outcome.kind == "eject":
                return number, tokens
    return None


def truncated(weights: Tensors) -> Tensors:
    """As int8, but rounded towards zero: a quantiser that is not the one declared."""
    found = dict(weights)
    for name, tensor in weights.items():
        if is_quantised(name, tensor):
            scale_R1 = tensor.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
            found[name] = ((tensor.float() / scale_R1).trunc() * scale_R1).bfloat16()
    return found


def posing(folder: Path, honest_ones: Sequence[Request], asked: Sequence[Request], rng: np.random.Generator, runs: int):
    """Nodes that declare one quantiser and compute with weights of another, until they are ejected."""
    weights, eos = tensors(folder), sorted(Model(str(folder)).eos_ids)
    declared: dict[Quantiser, dict[str, Tensors]] = {
        "int8": {"int4": dict(quantised(weights.items(), "int4")), "int8 towards zero": truncated(weights)},
        "fp8": {"int8": dict(quantised(weights.items(), "int8")), "int4": dict(quantised(weights.items(), "int4"))},
        "": {"int8": dict(quantised(weights.items(), "int8"))},
    }
    rows: list[dict[str, Any]] = []
    for (quantiser, others), kind in itertools.product(declared.items(), DTYPES):
        verifier = engine(folder, weights, Kind("torch-cpu-fp32", quantiser=quantiser), eos)
        maker = engine(folder, weights, Kind(kind, quantiser=quantiser), eos)
        profile, _ = calibrated(kind, maker, verifier, honest_ones, tolerance=TOLERANCE[kind])
        for what, made in others.items():
            maker.load(made.items())
            found = findings(profile, list(play(maker, verifier, asked)))
            name = f"declares {quantiser or 'no quantiser'}, is {what}, in {kind.removeprefix('torch-cpu-')}"
            rows.append({"name": name, **_lasts(profile, found, rng, runs)})
            say(f"posing {folder.name}: {rows[-1]}")
    return rows


def _lasts(profile: Profile, found: Sequence[Finding], rng: np.random.Generator, runs: int) -> dict[str, Any]:
    """How long a node with such rollouts lasts, in medians of lives resampled from them."""
    pool = np.array(found, dtype=object)
    ends = [until_caught(lambda: list(rng.choice(pool, SIZE))) for _ in range(runs)]
    caught = [end for end in ends if end is not None]
    is_caught = len(caught) == runs
    return {
        "outcome": "caught" if is_caught else "worthless",
        "submissions_until_caught": statistics.median(end[0] for end in caught) if is_caught else None,
        "tokens_until_caught": statistics.median(end[1] for end in caught) if is_caught else None,
        "caught": len(caught) / runs,
        "flipped": round(sum(one.flips for one in found) / sum(one.tokens for one in found), 4),
    }


QUICK_CHEATS = ("unseeded", "int4 weights", "temperature 0.9")


def power(
    folder: Path, profile: Profile, asked: Sequence[Request], against: str, rng: np.random.Generator, runs: int,
    only: Sequence[str] = (),
):  # fmt: skip
    """Each cheat: growth in nats per token, and how long it lasts in lives resampled from its rollouts."""
    model, weights = Model(str(folder)), tensors(folder)
    eos, node = sorted(model.eos_ids), Kind("torch-cpu-bf16")
    verifier = engine(folder, weights, Kind(against), eos)
    rows: list[dict[str, Any]] = []
    for name, change in cheats(weights, model.vocab, rng).items():
        if only and name not in only:
            continue
        maker = engine(folder, change.get("weights", weights), node, eos)
        tricks = {key: change[key] for key in ("sent", "edit") if key in change}
        seen = list(play(maker, verifier, asked, **tricks))
        found = findings(profile, seen)
        lasts = _lasts(profile, found, rng, runs)
        tokens = lasts["tokens_until_caught"]
        kl = bounds.growth(profile, seen)
        bound = math.log(1 / SETTINGS.false_ejection_probability) / kl if kl else None
        rows.append({
            "name": name, "layer": "replay", **lasts, "nats_per_token": round(kl, 5),
            "tokens_over_bound": round(tokens / bound, 2) if tokens and bound else None,
            "gain": None if lasts["outcome"] == "caught" else "not told from honest numerics by its tokens",
        })  # fmt: skip
        say(f"power {folder.name}: {rows[-1]}")
    return rows


LOOKED = 0.625
"""Share of submissions that the tripwire sees: half of the groups have variance, and of the others a quarter."""


def at_the_floor(
    good: Sequence[Finding], bad: Sequence[Finding], rng: np.random.Generator, runs: int, looked: float
) -> list[int]:
    """Submissions from its first cheat until a trusted node at the audit floor is caught, cheating on one in ten.

    `looked` is the share of its submissions that the trainer's tripwire sees; what trips is audited in full.
    """
    ends: list[int] = []
    trusted = NodeRecord("trusted", audited_submissions=40, audited_rollouts=500, clean_rollouts=500)
    for _ in range(runs):
        record, number, is_over = trusted, 0, False
        while not is_over and number < 1000:
            number += 1
            mine = [
                bad[rng.integers(len(bad))] if rng.random() < 0.1 else good[rng.integers(len(good))]
                for _ in range(SIZE)
            ]
            record = submitted(record, sum(one.tokens for one in mine))
            p = audit_probability(record, SETTINGS)
            trips = rng.random() < looked and tripped(("s", np.array(one.log_ratios)) for one in mine)
            if drawn := replayed([one for one in mine if trips or rng.random() < p]):
                record, outcome = fold(record, drawn, SETTINGS, was_trusted=p < 1)
                second = (
                    confirm(record, drawn, SETTINGS, was_trusted=p < 1)[1] if outcome.kind == "quarantine" else None
                )
                is_over = second is not None and second.kind == "eject"
        ends.append(number)
    return ends


# --- price -----------------------------------------------------------------------------------------------------------


class Ordinary(decode._Sampler):
    """Sampling as everybody does it: softmax and multinomial."""

    def pick(self, logits_BV: torch.Tensor, position_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        score_BV = policy_scores(logits_BV, self._temperature_B)
        logp_BV = score_BV.log_softmax(dim=-1)
        token_B = torch.multinomial(logp_BV.exp(), 1)[:, 0]
        return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


def price(folder: Path, rng: np.random.Generator, pairs: int, rows: int, prompts: Sequence[tuple[int, ...]]) -> dict:
    """Seeded over ordinary sampling on the same loop, interleaved; and replay over generation, per token."""
    maker = engine(folder, tensors(folder), Kind("torch-cpu-bf16", rows=rows), [])
    ratios, audits = [], []
    seeded = decode._Sampler
    for number in range(pairs + 1):
        asked = requests(rng, prompts, rows, 1.0, 8)
        taken = {}
        for name, sampler in (
            (("seeded", seeded), ("ordinary", Ordinary)) if number % 2 else (("ordinary", Ordinary), ("seeded", seeded))
        ):
            decode._Sampler = sampler
            before = time.process_time()
            done = maker.generate(asked)
            taken[name] = time.process_time() - before
            decode._Sampler = seeded
        before = time.process_time()
        maker.replay([(request, item.ids) for request, item in zip(asked, done, strict=True)])
        if number:  # the first warms up
            ratios.append(taken["seeded"] / taken["ordinary"])
            audits.append((time.process_time() - before) / taken["seeded"])
    say(f"price {folder.name}: seeded {statistics.median(ratios):.3f}, audit {statistics.median(audits):.3f}")
    return {"seeded_noise_ratio": statistics.median(ratios), "audit_cost_per_token_ratio": statistics.median(audits)}


# --- all of it -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", type=Path, help="folder of a finished run of examples/demo.toml")
    parser.add_argument("--smol", type=Path, help="folder of a finished run of examples/smollm2-sums.toml")
    arguments = parser.parse_args()
    rng = np.random.default_rng(20261124)
    part = 0.05 if arguments.quick else 1.0
    model = Model(str(TOY))
    first, last = policies_of(TOY, arguments.run)
    shapes = {
        "pairs": PAIRS[:5], "max_new_tokens": 32, "temperature": 2.0,
        "calibrate": int(2000 * part), "judge": int(3000 * part),
        "eos": sorted(model.eos_ids),
        "easy": toy_prompts(model, slice(0, 1024)), "hard": toy_prompts(model, slice(1024, None)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        policies = wide(Path(name), rng)
        prompts = by_difficulty(Path(name), policies[0], rng, 1536)
        broad = {
            "pairs": PAIRS, "max_new_tokens": 16, "temperature": 1.0,
            "calibrate": int(4000 * part), "judge": int(16_000 * part),
            "easy": prompts[:1024], "hard": prompts[1024:], "eos": WIDE_EOS,
        }  # fmt: skip
        parts = [honest(Path(name), policies[0], policies[-1], broad, rng)]
        behind = [honest(Path(name), policies[0], one, broad | {"pairs": PAIRS[:1], "judge": int(4000 * part)}, rng)
                  for one in policies]  # fmt: skip
    parts.append(honest(TOY, first, last, shapes, rng))
    figures: dict[str, Any] = {"quick": arguments.quick, "last_policy": bool(arguments.run),
                               "smol_last_policy": bool(arguments.smol)}  # fmt: skip
    figures["tripwire_drop_by_staleness"] = {
        str(POLICIES - 1 - i): one["rows"][0]["tripwire_drop"] for i, one in enumerate(behind)
    }
    if SMOL.exists():
        smol = Model(str(SMOL))
        words = ("gravity", "a cell", "rain", "love", "Paris", "jazz", "salt", "a verb", "steel", "an atom", "history")
        prompts = [tuple(smol.prompt_ids(f"Explain in a few words what {word} is.")) for word in words]
        count = max(48, int(SMOL_ROLLOUTS * part))
        pairs = (
            PAIRS[2],
            (PAIRS[0][0], PAIRS[0][1], 0.15),
        )  # bfloat16 is emulated, and slow, where there is no AVX-512
        some = {"pairs": pairs[:1] if arguments.quick else pairs,
                "max_new_tokens": 24, "temperature": 1.0, "calibrate": max(48, count // 5), "judge": count,
                "easy": prompts[:8], "hard": prompts[8:], "eos": sorted(smol.eos_ids)}  # fmt: skip
        parts.append(honest(SMOL, *policies_of(SMOL, arguments.smol), some, rng))
        figures |= _smol(rng, prompts, arguments.quick)
    else:
        figures["skipped"] = f"{SMOL} is missing: python scripts/get_smollm2.py"
    figures |= _sum_up(parts, rng, 1000 if not arguments.quick else 200)
    figures["verification_overhead_steady"] = _steady(arguments.run)
    sys.stdout.write(json.dumps(figures) + "\n")


def _smol(rng: np.random.Generator, prompts: Sequence[tuple[int, ...]], is_quick: bool) -> dict[str, Any]:
    asked = requests(rng, prompts, 16 if is_quick else 96, 1.0, 24)
    maker = engine(SMOL, tensors(SMOL), Kind("torch-cpu-bf16"), sorted(Model(str(SMOL)).eos_ids))
    verifier = engine(SMOL, tensors(SMOL), Kind("torch-cpu-fp32"), sorted(Model(str(SMOL)).eos_ids))
    honest_ones = requests(rng, prompts, 48 if is_quick else 512, 1.0, 24)
    profile, known = calibrated("torch-cpu-bf16", maker, verifier, honest_ones)
    attacks = power(SMOL, profile, asked, "torch-cpu-fp32", rng, 100, QUICK_CHEATS if is_quick else ())
    attacks += posing(SMOL, honest_ones, asked, rng, 20 if is_quick else 100)
    if not is_quick:  # an audit takes whole rollouts, so short ones come nearer to the bound
        brief = power(SMOL, profile, requests(rng, prompts, 288, 1.0, 8), "torch-cpu-fp32", rng, 100)
        attacks += [row | {"name": f"{row['name']}, at most 8 tokens"} for row in brief]
    sent = {"sent": lambda request: replace(request, seed=int(rng.integers(0, 2**63)))}
    bad = findings(profile, list(play(maker, verifier, asked, **sent)))
    good = findings(profile, known)
    for layer, looked in (("tripwire", LOOKED), ("replay", 0.0)):
        ends = at_the_floor(good, bad, rng, 200, looked)
        attacks.append({
            "name": "unseeded on 10 % of rollouts, at the audit floor" + ("" if looked else ", by audits alone"),
            "outcome": "caught" if max(ends) < 1000 else "worthless",
            "layer": layer, "submissions_until_caught": statistics.median(ends),
            "tokens_until_caught": None, "gain": None,
            "submissions_95th": float(np.quantile(ends, 0.95)),
        })  # fmt: skip
        say(f"at the floor: {attacks[-1]}")
    return {"attacks": attacks, "calibrated_on": profile.honest.tokens} | price(
        SMOL, rng, 3 if is_quick else 21, 8 if is_quick else 16, prompts
    )


def _sum_up(parts: Sequence[dict[str, Any]], rng: np.random.Generator, count: int) -> dict[str, Any]:
    e = np.stack([values for part in parts for values in part["e"]])
    counting = [row for part in parts for row in part["rows"] if row["counts"]]
    highest = lives(e, rng, count, 400)
    mean = e.mean(axis=1)
    return {
        "honest_rollouts": sum(row["rollouts"] for row in counting),
        "honest_tokens": sum(row["tokens"] for row in counting),
        "honest_rollouts_of_all_pairs": sum(part["rollouts"] for part in parts),
        "honest_ejected": sum(part["ejected"] for part in parts),
        "honest_voided": sum(row["voided"] for row in counting),
        "honest_mean_e": float(mean.mean()),
        "honest_mean_e_interval": [float(mean.mean() + z * mean.std() / math.sqrt(len(mean))) for z in (-1.96, 1.96)],
        "honest_lives": count,
        "sup_m_exceedance": {str(x): float((highest >= x).mean()) for x in (10, 100, 1000)},
        "pairs": [row for part in parts for row in part["rows"]],
    }


def _steady(run: Path | None) -> float | None:
    return json.loads((run / "summary.json").read_text())["verification_overhead_steady"] if run else None


if __name__ == "__main__":
    main()
