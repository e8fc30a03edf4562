"""Several processes train as one does, and what they save goes on in a world of another size."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
CHILD = Path(__file__).with_name("ranks_child.py")
WAIT_S = 300.0


def alone(out: Path, steps: int, resume: str = "") -> dict[str, Any]:
    """The same in this process."""
    spec = importlib.util.spec_from_file_location("ranks_child", CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out.mkdir()
    module.main(out, steps, resume)
    return json.loads((out / "found.json").read_text())


def together(out: Path, world: int, steps: int, resume: str = "") -> dict[str, Any]:
    """Run so many processes to their end; gives what rank 0 wrote."""
    out.mkdir()
    port = 20_000 + os.getpid() % 20_000
    command = [sys.executable, str(CHILD), str(out), str(steps), *([resume] if resume else [])]
    common = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    try:
        errors = [child.communicate(timeout=WAIT_S)[1].decode() for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * world, "\n".join(errors)
    return json.loads((out / "found.json").read_text())


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    for row, same in zip(one["losses"], other["losses"], strict=True):
        assert row == pytest.approx(same, rel=2e-3, abs=1e-4)
    assert one["weights"].keys() == other["weights"].keys()
    for name, values in one["weights"].items():
        assert values == pytest.approx(other["weights"][name], abs=2e-3), name


@pytest.mark.timeout(2 * WAIT_S)
def test_two_processes_train_as_one_and_their_checkpoint_goes_on_alone(tmp_path: Path) -> None:
    one = alone(tmp_path / "one", 2)
    whole = alone(tmp_path / "whole", 2, one["path"])
    two = together(tmp_path / "two", 2, 2, one["path"])
    assert len(list(Path(two["path"]).glob("model-*-of-00002.safetensors"))) == 2
    assert_alike(whole, two)
    assert_alike(alone(tmp_path / "after-whole", 1, whole["path"]), alone(tmp_path / "after-two", 1, two["path"]))
