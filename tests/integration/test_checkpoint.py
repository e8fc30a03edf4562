"""Checkpoints: complete or absent, and a resumed run ends in the same bits as one that never stopped."""

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from farflung.learner import checkpoint, disk_full  # noqa: E402
from farflung.learner.optimise import Learner, Optimisation  # noqa: E402
from farflung.learner.pack import Rollout, Segment, pack  # noqa: E402
from farflung.learner.policy import Policy  # noqa: E402
from farflung.protocol.errors import ConfigError  # noqa: E402
from second_device import DEVICES  # noqa: E402
from small_disk import small_disk  # noqa: E402


@pytest.fixture
def learner(tiny_qwen):
    """A builder of learners that all start alike."""

    def build(place: str = "cpu", **changes: object) -> Learner:
        return Learner(Policy(tiny_qwen(**changes).to(place)), Optimisation(lr=1e-3, warmup_steps=4, minibatches=2))

    return build


def batch(step: int):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(2, 32, (6, 14), generator=generator).tolist()
    segments = [(Segment("prompt", tuple(row[:4])), Segment("model", tuple(row[4:]))) for row in ids]
    return pack([Rollout(s, (-1.0) ** k, 1.0) for k, s in enumerate(segments)], 42)


def digest(learner: Learner) -> str:
    """Over the masters and the optimizer's whole state."""
    sha = hashlib.sha256()
    for name, tensor in sorted((*learner.policy.masters(), *checkpoint._optimizer_tensors(learner))):
        sha.update(name.encode() + tensor.cpu().numpy().tobytes())
    return sha.hexdigest()


def test_a_resumed_run_ends_in_the_same_bits(learner, device, tmp_path: Path) -> None:
    unbroken, first = learner(device), learner(device)
    for step in range(4):
        unbroken.step(batch(step))
    for step in range(2):
        first.step(batch(step))
    saved = checkpoint.save(first, 2, tmp_path)
    resumed = learner(device, seed=7)
    assert checkpoint.load(resumed, saved.path) == 2
    assert resumed.updates == first.updates == 4
    assert digest(resumed) == digest(first)
    states = [value for state in resumed.optimizer.state.values() for value in state.values()]
    assert {value.device.type for value in states} == {resumed.policy.device.type}, "the step counters too"
    for step in range(2, 4):
        resumed.step(batch(step))
    assert digest(resumed) == digest(unbroken)


@pytest.mark.parametrize("place", DEVICES[1:])
def test_a_run_goes_on_elsewhere(learner, place: str, tmp_path: Path) -> None:
    """To another device and back: what is saved is the same wherever it came from."""
    here, there = learner(), learner(place, seed=7)
    here.step(batch(0))
    checkpoint.load(there, checkpoint.save(here, 1, tmp_path / "here").path)
    assert digest(there) == digest(here)
    back = learner(seed=8)
    checkpoint.load(back, checkpoint.save(there, 1, tmp_path / "there").path)
    assert digest(back) == digest(here)
    assert back.step(batch(1)).loss == pytest.approx(there.step(batch(1)).loss, abs=1e-5)


def test_no_step_draws_a_random_number(learner, device) -> None:
    """So no state of a device has to come back with a checkpoint."""
    one = learner(device)
    kinds = [torch, *([torch.get_device_module(device)] if device != "cpu" else [])]
    before = [kind.get_rng_state() for kind in kinds]
    one.step(batch(0))
    assert all(torch.equal(kind.get_rng_state(), state) for kind, state in zip(kinds, before, strict=True))


def test_the_random_state_comes_back(learner, tmp_path: Path) -> None:
    one = learner()
    saved = checkpoint.save(one, 0, tmp_path)
    expected = torch.rand(4)
    checkpoint.load(one, saved.path)
    assert torch.equal(torch.rand(4), expected)


def test_the_folder_is_a_model_that_can_be_loaded(learner, device, tmp_path: Path) -> None:
    one = learner(device)
    one.step(batch(0))
    saved = checkpoint.save(one, 12, tmp_path)
    assert saved.path.name == "step-000012"
    reloaded = dict(Policy.from_pretrained(saved.path).masters())
    assert all(torch.equal(tensor.cpu(), reloaded[name]) for name, tensor in one.policy.masters())


def test_the_newest_are_kept_and_found(learner, tmp_path: Path) -> None:
    one = learner()
    assert checkpoint.latest(tmp_path / "absent") is None
    for step in (3, 5, 4, 5):
        checkpoint.save(one, step, tmp_path, keep=2)
    assert [found.step for found in checkpoint.complete(tmp_path)] == [4, 5]
    assert checkpoint.latest(tmp_path).step == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.parametrize("damage", ["marker", "file", "truncated"])
def test_an_incomplete_checkpoint_is_refused_and_not_found(learner, tmp_path: Path, damage: str) -> None:
    one = learner()
    checkpoint.save(one, 1, tmp_path)
    saved = checkpoint.save(one, 2, tmp_path)
    weights = saved.path / "model.safetensors"
    if damage == "marker":
        (saved.path / "COMPLETE").unlink()
    elif damage == "file":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="incomplete"):
        checkpoint.load(one, saved.path)
    assert checkpoint.latest(tmp_path).step == 1


def spoil(file: Path, damage: str) -> None:
    data = file.read_bytes()
    if damage == "zeros":
        file.write_bytes(data[:-100] + bytes(100))
    elif damage == "bit":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
@pytest.mark.parametrize("damage", ["zeros", "bit", "cut", "missing"])
def test_of_damaged_checkpoints_the_one_before_is_taken_else_none(learner, tmp_path: Path, name, damage) -> None:
    one = learner()
    for step in (1, 2):
        checkpoint.save(one, step, tmp_path)
    found = checkpoint.newest(tmp_path, 9)
    assert found is not None
    assert found.step == 2
    spoil(found.path / name, damage)
    earlier = checkpoint.newest(tmp_path, 9)
    assert earlier is not None
    assert checkpoint.load(one, earlier.path) == earlier.step == 1
    spoil(earlier.path / name, damage)
    assert checkpoint.newest(tmp_path, 9) is None
    checkpoint.save(one, 2, tmp_path)
    assert checkpoint.newest(tmp_path, 9) == found, "what was set aside is in nobody's way"


def test_a_damaged_checkpoint_is_not_exported(learner, tmp_path: Path) -> None:
    saved = checkpoint.save(learner(), 1, tmp_path)
    spoil(saved.path / "model.safetensors", "zeros")
    with pytest.raises(ConfigError, match=r"damaged: model\.safetensors .* name another step"):
        list(checkpoint.published(saved.path, is_dithered=False))


def test_a_checkpoint_of_an_earlier_version_has_sizes_alone(learner, tmp_path: Path) -> None:
    saved = checkpoint.save(learner(), 1, tmp_path)
    sizes = {name: mark["size_bytes"] for name, mark in json.loads((saved.path / "COMPLETE").read_text()).items()}
    (saved.path / "COMPLETE").write_text(json.dumps(sizes))
    assert checkpoint.newest(tmp_path, 1) == saved


def test_a_crash_while_writing_leaves_the_last_checkpoint(learner, tmp_path: Path, monkeypatch) -> None:
    one = learner()
    checkpoint.save(one, 1, tmp_path)

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", crash)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(one, 2, tmp_path)
    assert checkpoint.latest(tmp_path).step == 1
    checkpoint.save(one, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_full_disk_is_waited_out(learner, tmp_path: Path, monkeypatch) -> None:
    """A real file system that the first checkpoint fits, the second does not, until it is larger."""
    small = tmp_path / "disk"
    one = learner()
    one.step(batch(1))
    size_bytes = sum(file.stat().st_size for file in checkpoint.save(one, 1, tmp_path / "free").path.iterdir())
    monkeypatch.setattr(disk_full, "PAUSE_S", 0.05)
    said: list[str] = []

    async def write(step: int) -> checkpoint.Checkpoint:
        return await asyncio.to_thread(checkpoint.save, one, step, small)

    with small_disk(small, size_bytes * 3 // 2) as resize:

        def hear(error: str) -> None:
            said.append(error)
            assert [path.name for path in small.iterdir()] == ["step-000001"] or not error, "half a checkpoint stays"
            if len(said) == 3:
                resize(size_bytes * 4)

        checkpoint.save(one, 1, small)
        saved = asyncio.run(disk_full.retry_when_disk_full("a checkpoint", lambda: write(2), hear, lambda: False))
        assert said[0].startswith("waits for room on its disk to write a checkpoint: ")
        assert (len(said), said[-1]) == (4, "")
        assert checkpoint.latest(small) == saved


def test_a_checkpoint_of_another_model_is_refused(learner, tmp_path: Path) -> None:
    saved = checkpoint.save(learner(), 1, tmp_path)
    for changes in ({"num_hidden_layers": 1}, {"hidden_size": 32}):
        with pytest.raises(ConfigError, match="another model"):
            checkpoint.load(learner(**changes), saved.path)


def test_nothing_in_the_folder_is_a_pickle(learner, tmp_path: Path) -> None:
    saved = checkpoint.save(learner(), 1, tmp_path)
    names = {path.name for path in saved.path.iterdir()}
    assert names == {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"}
    assert json.loads((saved.path / "state.json").read_text())["step"] == 1


@pytest.mark.parametrize("error", [OSError(2, "No such file"), ValueError("(os error 2)")])
def test_what_is_no_full_disk_is_raised_at_once(error: Exception) -> None:
    async def write() -> None:
        raise error

    with pytest.raises(type(error)):
        asyncio.run(disk_full.retry_when_disk_full("a checkpoint", write, pytest.fail, lambda: False))


def test_a_trainer_that_is_told_to_stop_does_not_wait_for_room() -> None:
    async def write() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        asyncio.run(disk_full.retry_when_disk_full("a checkpoint", write, pytest.fail, lambda: True))
