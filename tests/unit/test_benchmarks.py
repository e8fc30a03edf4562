"""Each benchmark says what it measures in the small and how to measure it whole; `make bench` starts no other file."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bench").glob("*.py"))
PARTS = {"learn_peer.py", "real_models.py"}
"""Parts of others, which run in environments of their own."""


@pytest.mark.parametrize("path", [path for path in FILES if path.name not in PARTS], ids=lambda path: path.stem)
def test_a_benchmark_says_what_quick_measures_and_names_the_full_command(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert "`--quick`" in said
    command = re.search(r"full command is\s+`python bench/([^\s`]+)[^`]*`", said)
    assert command, "say: the full command is `python bench/NAME.py`"
    assert command[1] == path.name


def test_what_make_bench_starts_are_the_benchmarks() -> None:
    command = ["make", "-n", "bench"]
    recipe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    chosen = re.search(r"\$\((grep [^)]*)\)", recipe)
    assert chosen, recipe
    found = subprocess.run(["sh", "-c", chosen[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {Path(name).name for name in found} == {path.name for path in FILES} - PARTS
