"""Where settings come from, and which folder they mean."""

import json
import shutil
from pathlib import Path

import pytest

from farflung.config import Config, load, load_run, save
from farflung.protocol.errors import ConfigError

TEXT = '# Grüße\n[run]\nname = "a"\nsteps = 3\n'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run whose `run.dir` is relative."""
    folder = tmp_path / "runs" / "a"
    (folder / "keys").mkdir(parents=True)
    config = Config.model_validate({"run": {"name": "a", "dir": "runs"}, "generate": {"max_new_tokens": 7}})
    save(config, folder / "config.json")
    return folder


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a mark"])
def test_text_is_utf8_with_a_mark_or_without(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(mark + TEXT.encode())
    assert load(path, environ={}).run.steps == 3


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.toml", TEXT.encode("latin-1"), "byte 0xfc at 4); save it as UTF-8"),
        ("a.toml", TEXT.encode("utf-16"), "byte 0xff at 0); save it as UTF-8"),
        ("a.toml", b"\x7fELF\x02\x01\x00\x00", "not valid TOML"),
        ("a.toml", bytes(64), "not valid TOML"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[1]", "holds a list"),
        ("a.json", b"[" * 200_000, "not valid JSON"),
        ("a", b"[run", "not valid TOML"),
    ],
)
def test_what_is_no_configuration_is_one_sentence(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load(path, environ={})
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_flags_go_before_the_environment_and_children_see_neither(run: Path) -> None:
    environ = {"FARFLUNG_GENERATE__MAX_NEW_TOKENS": "24", "FARFLUNG_RUN__STEPS": "9"}
    config = load(run / "config.json", ("--generate.max_new_tokens", "20"), environ)
    assert (config.generate.max_new_tokens, config.run.steps) == (20, 9)
    save(config, run / "config.json")
    assert load(run / "config.json", environ={}) == config


def test_the_saved_configuration_means_its_own_folder_wherever_that_is(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "b"
    shutil.move(run, moved)
    for config in (load(moved / "config.json", environ={}), load_run(moved)):
        assert config.folder == moved
        assert config.run.name == "a"
        assert config.database_url == f"sqlite:///{moved / 'farflung.db'}"
        assert config.blobs_url == f"file://{moved / 'blobs'}"


@pytest.mark.parametrize("change", ["flag", "environment", "update"])
def test_another_run_that_begins_with_it_has_its_own_folder(run: Path, change: str) -> None:
    """Or `--fresh` of that one would empty this one."""
    flags = ("--run.name", "b") if change == "flag" else ()
    config = load(run / "config.json", flags, {"FARFLUNG_RUN__NAME": "b"} if change == "environment" else {})
    if change == "update":
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": "b"})})
    assert config.folder == Path("runs/b")


def test_a_file_of_that_name_that_is_in_no_run_means_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"run": {"name": "a", "dir": "runs"}}))
    assert load(path, environ={}).folder == Path("runs/a")


def test_a_profile_that_was_made_for_a_run_moves_with_it(run: Path, tmp_path: Path) -> None:
    made = run / "profiles" / "torch-cpu-fp32.json"
    made.parent.mkdir()
    made.write_text("{}")
    config = load_run(run)
    model = config.model.model_copy(update={"profile": str(made), "profiles": ("other", str(made))})
    save(config.model_copy(update={"model": model}), run / "config.json")
    moved = tmp_path / "b"
    shutil.move(run, moved)
    here = str(moved / "profiles" / made.name)
    assert load_run(moved).model.profile == here
    assert load_run(moved).model.profiles == ("other", here)


@pytest.mark.parametrize(("most", "deadline_s"), [(256, 300), (750, 300), (4096, 1638.4), (32_768, 13_107.2)])
def test_a_lease_is_long_enough_for_the_longest_answer_of_the_slowest_node(most: int, deadline_s: float) -> None:
    assert Config.model_validate({"generate": {"max_new_tokens": most}}).deadline_s == pytest.approx(deadline_s)
