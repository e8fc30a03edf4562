import subprocess
import sys
from pathlib import Path

import pytest

from farflung.envs.load import load_env
from farflung.protocol.errors import ConfigError

OWN = Path(__file__).parents[2] / "examples" / "own_env" / "env.py"


def test_built_in_environments():
    assert load_env("sums", {"digits": 2}).spec == {"digits": 2, "terms": 2}
    pytest.importorskip("reasoning_gym")
    assert load_env("reasoning_gym:gcd", {"size": 3}).spec["name"] == "gcd"


def test_the_example_of_ones_own_environment():
    env = load_env(f"{OWN}:Env")
    assert [task for task in env.tasks("train") if task in list(env.tasks("eval"))] == []
    (task,) = [task for task in env.tasks("eval") if task["word"] == "chair"]
    assert env.score(task, " riahc\n").reward == 1
    assert env.score(task, "riahc chair").reward == 0
    assert load_env(f"{OWN}:Env", {"words": "one two"}).spec == {"words": "one two"}


def test_a_question_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "2+2?", "answer": 4}\n')
    assert load_env(str(path), {"match": "number"}).spec["match"] == "number"


@pytest.mark.parametrize(
    ("spec", "args", "words"),
    [
        ("smus", {}, "did you mean 'sums'"),
        ("sums:fast", {}, "there is no environment"),
        ("nonsense", {}, "choose sums"),
        ("sums", {"digit": 3}, "its arguments are: digits, terms"),
        ("reasoning_gym", {}, "missing a required argument: 'name'"),
        (str(OWN), {}, "names no class"),
        (f"{OWN}:Envy", {}, "nearest it has is 'Env'"),
        ("missing/env.py:Env", {}, "there is no file"),
    ],
)
def test_errors_say_what_to_change(spec, args, words):
    with pytest.raises(ConfigError, match=words):
        load_env(spec, args)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module", "does not import: ModuleNotFoundError"),
        ("raise SystemExit(3)", "does not import: SystemExit"),
        ("class Env:\n    def __init__(self): 1 / 0", "cannot be made: ZeroDivisionError"),
        ("class Env:\n    version = '1'", "lacks tasks, prompt, score, spec"),
    ],
)
def test_errors_of_a_users_file(tmp_path, source, words):
    path = tmp_path / "env.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=words):
        load_env(f"{path}:Env")


def test_loading_is_light():
    code = "import sys, farflung.envs.child_main, farflung.envs.child; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "transformers", "numpy", "reasoning_gym", "sqlalchemy"}
