"""The container and compose files, as far as that goes without a container runtime: every name in them exists."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from farflung.cli import app
from farflung.config import load
from farflung.net.admin import VARIABLE

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
OURS = {name: one for name, one in COMPOSE["services"].items() if "build" in one}


def known_variables() -> set[str]:
    """What env.example asks to be filled in."""
    return set(re.findall(r"(?m)^(\w+)=", (DEPLOY / "env.example").read_text()))


@pytest.mark.parametrize("name", OURS)
def test_the_commands_exist_and_their_settings_are_taken(name: str) -> None:
    command, config, *flags = OURS[name]["command"]
    assert command in list(app)
    mounts = dict(reversed(one.split(":")[:2]) for one in OURS[name]["volumes"] if "$" not in one)
    source = (DEPLOY / mounts[config]).resolve()
    if flags[0] == "--url":
        assert "--url" in {argument.name for argument in app[command].assemble_argument_collection()}
        host, port = flags[1].removeprefix("http://").split(":")
        assert (host in COMPOSE["services"], int(port)) == (True, load(source, environ={}).coordinator.port)
        flags = flags[2:]
    assert load(source, flags, environ={}).folder == Path("/runs/cloud")


def test_every_variable_is_asked_for_and_every_secret_reaches_its_role() -> None:
    used = set(re.findall(r"\$\{(\w+)\}", (DEPLOY / "compose.yaml").read_text()))
    assert used == known_variables()
    assert VARIABLE in OURS["coordinator"]["environment"]
    filled = re.findall(r"(?m)^(\w+)=.+$", (DEPLOY / "env.example").read_text())
    assert set(filled) == {"HOST", "MODEL", "AWS_ACCESS_KEY_ID"}, "no secret has a value that somebody might keep"


SECRETS = {"PGPASSWORD", "AWS_SECRET_ACCESS_KEY", VARIABLE}
NEEDS = {
    "database": {"PGPASSWORD"},
    "store": {"AWS_SECRET_ACCESS_KEY"},
    "bucket": {"AWS_SECRET_ACCESS_KEY"},
    "coordinator": SECRETS,
}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_has_the_secrets_that_it_needs_and_no_others(name: str) -> None:
    told = yaml.safe_dump(COMPOSE["services"][name])
    assert {secret for secret in SECRETS if f"${{{secret}}}" in told} == NEEDS.get(name, set())
    assert "env_file" not in told


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_the_folder_with_the_roots_key_is_the_coordinators_alone(name: str) -> None:
    mounts = [one.split(":") for one in COMPOSE["services"][name].get("volumes", ())]
    of_runs = [mount for mount in mounts if mount[0] == "runs"]
    assert bool(of_runs) == (name in ("coordinator", "handover"))
    if name == "handover":
        assert of_runs == [["runs", "/runs", "ro"]]
        assert COMPOSE["services"][name]["network_mode"] == "none"


def neighbours(name: str) -> set[str]:
    """Services that one can reach."""
    mine = set(COMPOSE["services"][name].get("networks", ()))
    return {other for other, one in COMPOSE["services"].items() if mine & set(one.get("networks", ()))} - {name}


def test_who_reads_strangers_text_has_its_key_and_the_coordinator_and_nothing_else() -> None:
    scorer = COMPOSE["services"]["scorer"]
    assert "environment" not in scorer
    assert [one.split(":")[0] for one in scorer["volumes"]] == ["scorer", "./run.toml"]
    assert neighbours("scorer") == {"coordinator"}
    assert all(COMPOSE["networks"][network]["internal"] for network in scorer["networks"])
    assert (scorer["read_only"], scorer["cap_drop"]) == (True, ["ALL"])
    assert neighbours("proxy") == {"coordinator"}
    for name in ("trainer", "validator"):
        assert neighbours(name) <= {"coordinator", "trainer", "validator"}


def test_each_role_is_handed_its_own_key(tmp_path: Path) -> None:
    """The script of the service, run over folders of its own."""
    script = COMPOSE["services"]["handover"]["entrypoint"][-1].replace("$$", "$")
    script = script.replace("/runs", f"{tmp_path}/runs").replace("/hand", f"{tmp_path}/hand")
    keys = tmp_path / "runs" / "cloud" / "keys"
    keys.mkdir(parents=True)
    assert subprocess.run(["sh", "-ec", script], check=False, stderr=subprocess.DEVNULL).returncode, "too early"
    for name in ("root", "coordinator", "scorer", "trainer", "validator-1", "delegations.json"):
        (keys / name).write_text(name)
    subprocess.run(["sh", "-ec", script], check=True)
    for role, key in (("scorer", "scorer"), ("trainer", "trainer"), ("validator", "validator-1")):
        found = {path.name: path for path in (tmp_path / "hand" / role).rglob("*") if path.is_file()}
        assert set(found) == {key, "delegations.json"}
        assert found[key].parent == tmp_path / "hand" / role / "cloud" / "keys"
        assert found[key].stat().st_mode & 0o777 == 0o600


def test_services_volumes_and_addresses_hang_together() -> None:
    services, settings = COMPOSE["services"], load(DEPLOY / "run.toml", environ={}).coordinator
    for name, service in services.items():
        for other in service.get("depends_on", ()):
            assert other in services, f"{name} waits for {other}"
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert source in COMPOSE["volumes"] or "$" in source or (DEPLOY / source).exists(), mount
    assert re.search(r"@(\w+)/", settings.database)[1] in services
    assert re.search(r"endpoint=http://(\w+):", settings.blobs)[1] in services
    assert "ports" not in services["coordinator"], "proxies = * is right only if nothing else reaches it"


IMAGES = ("Containerfile", "Containerfile.cuda")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_built_from_files_and_extras_that_exist(image: str) -> None:
    text = (DEPLOY / image).read_text()
    for line in re.findall(r"(?m)^COPY (.+)$", text):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [re.search(r"ARG EXTRAS=(\S+)", text)[1]]
    files = [one["build"] for one in OURS.values() if one["build"]["dockerfile"] == f"deploy/{image}"]
    asked += [one["args"]["EXTRAS"] for one in files if "args" in one]
    assert {extra for one in asked for extra in one.split(",")} <= set(project["optional-dependencies"])
    program, *_ = entry(text)
    assert program in project["scripts"]
    assert "USER farflung" in text


def entry(text: str) -> list[str]:
    """The command that an image starts."""
    return json.loads(re.search(r"(?m)^ENTRYPOINT (.+)$", text)[1])


def test_the_image_for_cards_starts_a_worker_in_a_folder_that_outlives_it() -> None:
    """It cannot be built here: what it names exists, and it takes torch from the index that has the build for CUDA."""
    text = (DEPLOY / "Containerfile.cuda").read_text()
    _, command, option, folder = entry(text)
    assert option in {argument.name for argument in app[command].assemble_argument_collection()}
    assert folder in json.loads(re.search(r"(?m)^VOLUME (.+)$", text)[1])
    assert folder in re.search(r"install -d -o farflung (.+)", text)[1].split(), "else its user cannot write there"
    assert "--index-url https://pypi.org/simple -c constraints.txt" in text
    assert re.search(r"(?m)^torch==[\d.]+$", (ROOT / "constraints.txt").read_text()), "pinned to no build for CPUs"


def test_the_page_on_cards_says_how_to_build_and_start_it() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    built = re.search(r"docker build -f (\S+) -t (\S+) \.", page)
    assert (ROOT / built[1]).exists()
    started = re.search(r"docker run (.*) (\S+) https://HOST:7000#ROOT", page)
    assert started[2] == built[2]
    assert "--gpus all" in started[1]
    assert re.search(r"-v \S+:/node\b", started[1]), "its key is its account"
