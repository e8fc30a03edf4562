"""Checkpoints of the trainer: masters, optimizer and random state in one folder, complete or absent.

    step-000012/
    ├── config.json             the folder is also a Hugging Face checkpoint
    ├── model.safetensors       float32 masters
    ├── adapter.safetensors     with learn.lora_rank, the adapters; the masters above have them merged, in bfloat16 as
    │                           published where adapters travel alone
    ├── optimizer.safetensors   AdamW's moments, `<state>/<parameter>`
    ├── state.json              step, optimizer updates, torch's random state
    └── COMPLETE                sizes and digests of the files above; written last

Of several ranks each writes its own shards, `model-00000-of-00002.safetensors` and so on; any number can go on from
them. It is written beside its place, flushed to disk and renamed, so a crash leaves the previous checkpoints whole.
A checkpoint that a disk has damaged since is found by digest before a resume, and set aside as damaged-step-000012.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from farflung.learner.lora import adapters
from farflung.learner.moments import HostAdamW
from farflung.learner.optimise import Learner
from farflung.learner.ranks import Ranks, broadcast_text, like, local, meet, own_rows, whole
from farflung.learner.row_reader import RowReader
from farflung.numerics.rounding import publishable
from farflung.protocol.digest import file_digest
from farflung.protocol.errors import ConfigError

log = logging.getLogger(__name__)
_MARKER = "COMPLETE"
_NAME = re.compile(r"step-(\d{6,})")
_UNFINISHED, _DAMAGED = ".unfinished-", "damaged-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    step: int
    path: Path


def save(learner: Learner, step: int, root: Path, *, keep: int = 2) -> Checkpoint:
    """Write the checkpoint of `step` under `root`, replacing one of the same step, and keep the newest `keep`."""
    root.mkdir(parents=True, exist_ok=True)
    ranks = learner.policy.ranks
    draft = Path(broadcast_text(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root) if ranks.rank == 0 else "", ranks))
    place = root / f"step-{step:06d}"
    try:
        _write_tensors(learner, draft, ranks)
        meet(ranks)
        if ranks.rank == 0:
            _write_rest(learner, step, draft)
    except (OSError, SafetensorError):
        shutil.rmtree(draft, ignore_errors=True)  # on a full disk, half of one would keep the next from fitting
        raise
    if ranks.rank == 0:
        if place.exists():
            place.rename(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root))
        draft.rename(place)
        _sync(root)
        _prune(root, keep)
    meet(ranks)
    return Checkpoint(step, place)


def load(learner: Learner, path: Path) -> int:
    """Put a checkpoint's masters, optimizer and random state into `learner`; returns its step, bit for bit as saved.

    Raises ConfigError if the checkpoint is incomplete or of another model.
    """
    _refuse_incomplete(path)
    try:
        _fill(learner, path)
        _fill_optimizer(learner, path)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"checkpoint {path} is of another model: {error}") from error
    state = json.loads((path / "state.json").read_text())
    learner.updates = state["updates"]
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch_rng"]), dtype=torch.uint8))
    return state["step"]


def published(path: Path, *, is_dithered: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The published weights of a checkpoint's step: its masters in bfloat16. Raises ConfigError if it is not whole."""
    _refuse_incomplete(path)
    if fault := _damage(path):
        raise ConfigError(f"checkpoint {path} is damaged: {fault}; name another step")
    with _reader(path, "model") as saved:
        for name in saved.shapes:
            yield name, publishable(saved.rows(name), is_dithered=is_dithered)


def complete(root: Path) -> list[Checkpoint]:
    """The complete checkpoints under `root`, oldest step first."""
    return sorted(_checkpoints(root), key=lambda checkpoint: checkpoint.step)


def latest(root: Path) -> Checkpoint | None:
    """The complete checkpoint of the highest step, if there is any."""
    return max(_checkpoints(root), key=lambda checkpoint: checkpoint.step, default=None)


def newest(root: Path, most: int) -> Checkpoint | None:
    """The newest whole checkpoint up to a step, if there is any; damaged ones on the way there are set aside."""
    for found in reversed(complete(root)):
        if found.step > most:
            continue
        if not (fault := _damage(found.path)):
            return found
        log.warning("checkpoint %s is damaged and set aside: %s", found.path, fault)
        place = found.path.with_name(f"{_DAMAGED}{found.path.name}")
        shutil.rmtree(place, ignore_errors=True)  # an earlier one of the same step
        found.path.rename(place)
    return None


def _write_tensors(learner: Learner, folder: Path, ranks: Ranks) -> None:
    part = "" if ranks.is_alone else f"-{ranks.rank:05d}-of-{ranks.world:05d}"
    masters = {name: local(tensor).cpu().contiguous() for name, tensor in learner.policy.shards()}
    own = {name: whole(parameter.detach()).cpu() for name, parameter in adapters(learner.policy.model)}
    if own and ranks.rank == 0:
        save_file(own, folder / "adapter.safetensors")
    # The metadata is what Hugging Face asks of a file of weights.
    save_file(masters, folder / f"model{part}.safetensors", metadata={"format": "pt"})
    save_file(dict(_optimizer_tensors(learner)), folder / f"optimizer{part}.safetensors")


def _write_rest(learner: Learner, step: int, folder: Path) -> None:
    learner.policy.model.config.save_pretrained(folder)
    state = {"step": step, "updates": learner.updates, "torch_rng": torch.get_rng_state().numpy().tobytes().hex()}
    (folder / "state.json").write_text(json.dumps(state))
    marks = {
        file.name: {"size_bytes": file.stat().st_size, "digest": file_digest(file)} for file in sorted(folder.iterdir())
    }
    for name in marks:
        _sync(folder / name)
    (folder / _MARKER).write_text(json.dumps(marks))
    _sync(folder / _MARKER)
    _sync(folder)


def _reader(folder: Path, kind: str) -> RowReader:
    """The tensors of one kind, of which several ranks wrote pieces; counters are the same in each."""
    return RowReader(sorted(folder.glob(f"{kind}*.safetensors")))


def _optimizer_tensors(learner: Learner) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in learner.policy.model.named_parameters():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", local(value).cpu().contiguous()


@torch.no_grad()
def _fill(learner: Learner, path: Path) -> None:
    """Masters, or adapters where nothing else is trained: then the learner has the base model in it already."""
    own = dict(adapters(learner.policy.model))
    with _reader(path, "adapter") as saved:
        if own.keys() != saved.shapes.keys():
            raise KeyError(f"it has {len(saved.shapes)} adapter tensors, learn.lora_rank asks for {len(own)}")
        _take(own, saved)
    if own:
        return
    masters = dict(learner.policy.shards())
    with _reader(path, "model") as saved:
        if masters.keys() != saved.shapes.keys():
            raise KeyError(f"tensors differ, one of them is {min(masters.keys() ^ saved.shapes.keys())}")
        _take(masters, saved)


def _take(places: Mapping[str, torch.Tensor], saved: RowReader) -> None:
    """Fill this rank's shares."""
    for name, place in places.items():
        if saved.shapes[name] != place.shape:
            raise KeyError(f"tensor {name} has shape {saved.shapes[name]}, the model {tuple(place.shape)}")
        local(place.detach()).copy_(saved.rows(name, *own_rows(place)))


@torch.no_grad()
def _fill_optimizer(learner: Learner, path: Path) -> None:
    parameters, is_on_host = dict(learner.policy.model.named_parameters()), isinstance(learner.optimizer, HostAdamW)
    learner.optimizer.state.clear()
    with _reader(path, "optimizer") as saved:
        for key, shape in saved.shapes.items():
            state, name = key.split("/", 1)
            place = parameters[name]
            # All of it lives with its parameter, the step counter too: the fused optimizer reads it there.
            if not shape:
                value = saved.rows(key).to(place.device)
            else:
                value = saved.rows(key, *own_rows(place))
                value = value if is_on_host else like(value.to(place.device), place)
            learner.optimizer.state[place][state] = value


def _checkpoints(root: Path) -> Iterator[Checkpoint]:
    for path in root.iterdir() if root.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and not _fault(path):
            yield Checkpoint(int(match[1]), path)


def _fault(path: Path) -> str:
    """The parts missing in the folder, empty if none."""
    marks = _marks(path)
    if not marks:
        return f"{_MARKER} is missing"
    for name, mark in marks.items():
        file, size_bytes = path / name, mark.get("size_bytes")
        if not file.is_file() or file.stat().st_size != size_bytes:
            return f"{name} is missing or not {size_bytes} bytes long"
    return ""


def _damage(path: Path) -> str:
    """The damage to a complete checkpoint since it was written, empty if none."""
    for name, mark in _marks(path).items():
        if "digest" in mark and file_digest(path / name) != mark["digest"]:
            return f"{name} does not have its digest"
    return ""


def _marks(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of COMPLETE for each file, none if it is not to be read; older ones have sizes alone."""
    try:
        marks = json.loads((path / _MARKER).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(marks, dict):
        return {}
    return {name: mark if isinstance(mark, dict) else {"size_bytes": mark} for name, mark in marks.items()}


def _refuse_incomplete(path: Path) -> None:
    fault = _fault(path)
    if fault:
        raise ConfigError(f"checkpoint {path} is incomplete: {fault}; name another one or remove it")


def _prune(root: Path, keep: int) -> None:
    """Remove what crashes left unfinished and all but the newest `keep` checkpoints."""
    for path in root.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)
    for checkpoint in complete(root)[: -max(keep, 1)]:
        shutil.rmtree(checkpoint.path)


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk; without it a rename may survive a power cut and its content not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
