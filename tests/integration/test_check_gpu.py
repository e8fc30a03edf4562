"""The script for owners of a GPU, on the CPU and on the second device; and it says so where something does not hold."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from second_device import FAR  # noqa: E402

pytestmark = pytest.mark.timeout(300)
SCRIPTS = Path(__file__).parents[2] / "scripts"
PASSED = {"noise": 2, "flips": 6}
"""Rows of a section that must hold."""


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    """Scripts find one another as they do where one of them is started."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def script(_path) -> ModuleType:
    return importlib.import_module("check_gpu")


@pytest.fixture(scope="module")
def models(_path) -> ModuleType:
    return importlib.import_module("gpu_setup")


@pytest.fixture(scope="module")
def sections(_path) -> ModuleType:
    return importlib.import_module("gpu_sections")


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPTS / "check_gpu.py"), "--tiny", *words]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def said() -> Iterator[dict[str, Any]]:
    """What the script says of both devices, by the device: its code, table, figures and progress."""
    running = {name: start("--device", name) for name in ("cpu", "second")}
    try:
        found = {}
        for name, process in running.items():
            out, progress = process.communicate(timeout=250)
            table, _, figures = out.strip().rpartition("\n")
            found[name] = process.returncode, table, json.loads(figures), progress
        yield found
    finally:
        for process in running.values():
            process.kill()


@pytest.mark.parametrize("name", ["cpu", "second"])
def test_every_section_is_measured_and_what_must_hold_does(said, script, name: str) -> None:
    code, table, figures, progress = said[name]
    assert code == 0, progress
    rows = figures["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(script.NAMES)
    assert not [row for row in rows if row["holds"] is False or row["found"].startswith("failed")]
    passed = PASSED | ({"run": 1} if name == "cpu" else {})
    assert {key: sum(row["holds"] is True for row in rows if row["section"] == key) for key in passed} == passed
    assert all(row["what"] in table and row["found"] in table for row in rows)
    assert figures["torch"] == torch.__version__
    assert "random parameters" in figures["model"]
    assert progress.splitlines()[0].endswith("importing torch and transformers")


def test_what_is_left_out_says_why(said) -> None:
    left = {
        (name, row["section"]): row["found"]
        for name, (_, _, figures, _) in said.items()
        for row in figures["rows"]
        if row["found"].startswith("left out")
    }
    assert set(left) == {("cpu", "step"), ("second", "step"), ("second", "run")}
    assert "a run has several" in left["second", "run"]
    assert said["second"][2]["device"].startswith(FAR)


def test_a_step_three_times_is_the_same_on_the_cpu(said) -> None:
    rows = [row for row in said["cpu"][2]["rows"] if row["section"] == "exact"]
    assert [row["value"] for row in rows] == [1, 1, 1, 1]


def test_a_section_that_fails_is_a_row_and_what_came_before_it_stays(sections, models) -> None:
    def broken(setup):
        yield sections.Row("the first", "1")
        raise RuntimeError("out of memory\nand more")

    first, last = sections.measured(broken, models.setup_on(torch.device("cpu"), is_tiny=True))
    assert (first.found, first.holds) == ("1", None)
    assert (last.found, last.holds) == ("failed: RuntimeError: out of memory", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_other_weights_do_not_hold(sections, models, dtype) -> None:
    setup = models.setup_on(torch.device("cpu"), is_tiny=True)
    engine = sections.LocalEngine(models.drawn(setup, dtype), eos_ids=())
    asked = models.requests(setup, 4, 8)
    generated = list(zip(asked, engine.generate(asked), strict=True))
    assert sections.agreement("same", models.on_cpu(engine, setup.shape), generated, dtype).holds
    other = models.drawn(setup, dtype)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    row = sections.agreement("other", sections.LocalEngine(other, eos_ids=()), generated, dtype)
    assert row.holds is False
    assert row.value > 0.5


def test_the_shape_is_the_largest_whose_step_fits(models, monkeypatch) -> None:
    largest, smaller = models.SHAPES[:2]
    need = largest.step_bytes(models.MICROBATCH_TOKENS)
    for room, shape in ((need, largest), (need - 1, smaller), (0, models.TINY)):
        monkeypatch.setattr(models, "room_bytes", lambda _, room=room: room)
        assert models.setup_on(torch.device("cpu"), is_tiny=False).shape == shape
    assert 28e9 < need < 36e9, "18 bytes a parameter, and activations"


def test_a_device_that_is_not_there_is_one_sentence(script) -> None:
    with pytest.raises(SystemExit, match="torch knows no device 'tpu'"):
        script._device("tpu")
