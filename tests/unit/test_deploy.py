"""The container and compose files, as far as that goes without a container runtime: every name in them exists."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from farflung.cli import app
from farflung.config import load
from farflung.protocol.admin import VARIABLE

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


def test_the_image_is_built_from_files_and_extras_that_exist() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"(?m)^COPY (.+)$", text):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [re.search(r"ARG EXTRAS=(\S+)", text)[1]]
    asked += [one["build"]["args"]["EXTRAS"] for one in OURS.values() if "args" in one["build"]]
    assert {extra for one in asked for extra in one.split(",")} <= set(project["optional-dependencies"])
    assert 'ENTRYPOINT ["farflung"]' in text
    assert "farflung" in project["scripts"]
    assert "USER farflung" in text
