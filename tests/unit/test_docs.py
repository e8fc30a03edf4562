"""The documentation keeps up: whatever the code has and people use is named there, and generated pages are fresh.

When a test of generated text fails: `python scripts/make_docs.py`.
"""

import ast
import importlib.util
import inspect
import json
import re
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest

from farflung import config, redteam
from farflung.cli import app
from farflung.envs import load, reasoning_gym
from farflung.launch import summary, swarm
from farflung.learner.optimise import StepMetrics
from farflung.net.session import Index
from farflung.protocol import errors, identity, messages
from farflung.protocol.states import LIFECYCLES
from farflung.store import metrics
from farflung.store.db import create_all
from farflung.store.sql_connections import open_engine
from farflung.trainer import Trainer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def in_code(text: str) -> set[str]:
    """Everything between single back-quotes."""
    return set(re.findall(r"`([^`\n]+)`", text))


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator()


# --- settings and commands -------------------------------------------------------------------------------------------


def test_config_page_is_what_the_fields_say(generator: ModuleType) -> None:
    assert page("config.md") == generator.config_page(), "run: python scripts/make_docs.py"


def test_every_setting_is_in_the_config_page() -> None:
    sections = set(config.Config.model_fields)
    keys = {name for name, _ in config.fields()} - sections
    assert keys <= in_code(page("config.md"))
    assert {f"## `{name}`" for name in sections} <= set(page("config.md").splitlines())


def test_every_section_has_an_introduction(generator: ModuleType) -> None:
    assert set(generator.SECTIONS) == set(config.Config.model_fields)


def commands() -> list[str]:
    return [name for name in app if not name.startswith("-")]


def test_command_page_is_what_the_docstrings_say(generator: ModuleType) -> None:
    assert page("cli.md") == generator.cli_page(), "run: python scripts/make_docs.py"


def test_every_command_and_option_is_in_the_command_page() -> None:
    """Each with a meaning: a parameter that its docstring passes over has an empty last cell."""
    parts = dict(re.findall(r"^### `([\w-]+)`\n(.*?)(?=^##|\Z)", page("cli.md"), re.DOTALL | re.MULTILINE))
    assert set(parts) == set(commands())
    for command in commands():
        meanings = dict(re.findall(r"^\| `([^`]+)` \|.*\| (.*) \|$", parts[command], re.MULTILINE))
        for argument in app[command].assemble_argument_collection():
            field = argument.field_info
            if field.kind is not field.VAR_POSITIONAL and not is_dataclass(argument.hint):
                name = argument.name.lstrip("-").upper() if field.is_positional else argument.name
                said = meanings.get(name) or meanings.get(f"[{name}]")
                assert said, f"{command} {name} is missing in docs/cli.md, or nothing is said of it"


def test_every_command_has_its_group() -> None:
    """And the groups that a newcomer needs come first."""
    of = {name: [group.name for group in app[name].group] for name in commands()}
    assert all(len(groups) == 1 and groups[0] != "Commands" for groups in of.values()), of
    headings = re.findall(r"^## (.+)$", page("cli.md"), re.MULTILINE)
    assert headings == ["Run", "Join", "Look", "Keep safe", "Try to break", "Roles"]
    assert {groups[0] for groups in of.values()} == set(headings)


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_protocol_page_is_what_the_code_says(generator: ModuleType) -> None:
    assert page("protocol.md") == generator.filled(page("protocol.md")), "run: python scripts/make_docs.py"


def test_every_generated_part_has_its_place(generator: ModuleType) -> None:
    texts = [page("protocol.md"), (ROOT / "README.md").read_text(), (ROOT / "dev" / "LOG.md").read_text()]
    places = [place for text in texts for place in re.findall(r"<!-- generated: (\w+) -->", text)]
    assert sorted(places) == sorted(generator.PARTS)


def test_every_route_is_in_the_protocol_page(generator: ModuleType) -> None:
    routes = {f"{route.method} {route.path}" for route in generator.routes()}
    assert routes <= in_code(page("protocol.md"))


def test_every_error_code_is_in_the_protocol_page() -> None:
    assert set(errors.by_code()) <= in_code(page("protocol.md"))


def test_every_message_and_field_is_in_the_protocol_page() -> None:
    parts = dict(re.findall(r"#### `(\w+)`\n(.*?)(?=\n#### |<!-- end -->)", page("protocol.md"), re.DOTALL))
    kinds = {
        name: kind
        for name, kind in vars(messages).items()
        if inspect.isclass(kind) and issubclass(kind, messages.Message) and kind is not messages.Message
    }
    for name, kind in (kinds | {"Index": Index, "Signed": identity.Signed}).items():
        assert set(kind.__struct_fields__) <= in_code(parts[name]), name


def test_every_status_is_in_the_protocol_page() -> None:
    text = page("protocol.md").split("## Lifecycles")[1]
    assert {status for life in LIFECYCLES.values() for status in life} <= in_code(text)
    assert all(f"**{noun}**" in text for noun in LIFECYCLES)


def test_the_worked_example_verifies(generator: ModuleType) -> None:
    key, body, headers, _ = generator.example_headers()
    method, path = "POST", generator.EXAMPLE_PATH
    signer = identity.verify_request(headers, method, path, "", now=generator.EXAMPLE_CREATED, tag=key.id)
    identity.check_digest(headers, body)
    assert signer.node == key.id
    assert headers["signature"] in page("protocol.md")


# --- figures ---------------------------------------------------------------------------------------------------------


def test_every_summary_field_is_in_the_metrics_page(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    settings = config.Config(run=config.RunSection(name="empty", dir=tmp_path))
    config.save(settings, folder / "config.json")
    (folder / "metrics.jsonl").write_text('{"kind": "start", "at": 1.0, "commit": "x"}\n')
    engine = open_engine(settings.database_url)
    create_all(engine)
    engine.dispose()
    figures = summary.summarise(folder)
    assert json.loads(json.dumps(figures)) == figures
    text = page("metrics.md").split("## `metrics.jsonl`")[0]
    assert set(figures) | _keys_of_dicts(summary._nodes) <= in_code(text)


def _keys_of_dicts(function: Any) -> set[str]:
    """The texts that are keys of dict displays inside a function or class."""
    tree = ast.parse(dedent(inspect.getsource(function)))
    displays = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    keys = [key.value for node in displays for key in node.keys if isinstance(key, ast.Constant)]
    return {key for key in keys if isinstance(key, str)}


def _written(module: ModuleType) -> dict[str, set[str]]:
    """Kind → fields of each `….write("kind", …, field=…)` in a module."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="write" | "_record"), args=[ast.Constant(value=str(kind)), *_], keywords=given
            ):
                found.setdefault(kind, set()).update(keyword.arg for keyword in given if keyword.arg)
    return found


def test_every_kind_and_field_of_metrics_jsonl_is_in_the_metrics_page() -> None:
    text = page("metrics.md").split("## `metrics.jsonl`")[1]
    written = _written(metrics) | _written(swarm)
    assert {"start", "end", "step", "eval", "node", "sent", "kill", "restart"} <= set(written)
    assert set(written) <= in_code(text)
    assert {name for names in written.values() for name in names} <= in_code(text)
    assert _keys_of_dicts(metrics.Metrics.note_node) <= in_code(text)
    trained = {field.name for field in dataclass_fields(StepMetrics)}
    assert trained | _keys_of_dicts(Trainer) <= in_code(text)


def test_every_prometheus_figure_is_in_the_metrics_page() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "src" / "farflung").rglob("*.py"))
    names = set(re.findall(r'"(farflung_[a-z_]+)",\s', sources))
    assert names <= set(re.findall(r"farflung_[a-z_]+", page("metrics.md")))


# --- environments and adversaries ------------------------------------------------------------------------------------


def test_every_environment_is_in_the_envs_page() -> None:
    text = page("envs.md")
    assert {name for name in load.BUILT_IN if name != "reasoning_gym"} <= in_code(text)
    assert "`reasoning_gym:TASK`" in text
    assert in_code(text) >= reasoning_gym.ALLOWED


def test_every_adversary_is_in_the_operate_page() -> None:
    assert set(redteam.GALLERY) <= in_code(page("operate.md"))


# --- prose -----------------------------------------------------------------------------------------------------------


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "dev" / "LOG.md", *DOCS.rglob("*.md")]
    for source in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source.read_text()):
            assert (source.parent / target).exists(), f"{source.relative_to(ROOT)} links to {target}"


def test_the_journey_names_functions_that_exist() -> None:
    for path, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", page("journey.md")):
        tree = ast.parse((ROOT / "src" / "farflung" / path).read_text())
        body: list[ast.stmt] = tree.body
        for part in name.split("."):
            found = [node for node in body if getattr(node, "name", None) == part]
            assert found, f"{path} has no {name}"
            body = getattr(found[0], "body", [])


def test_decisions_have_their_four_parts(generator: ModuleType) -> None:
    for path in generator.decisions():
        for part in ("**Context.**", "**Options.**", "**Choice.**", "**What would change it.**"):
            assert part in path.read_text(), f"{path.name} lacks {part}"


def test_index_of_decisions_is_what_their_titles_say(generator: ModuleType) -> None:
    assert page("decisions/README.md") == generator.decisions_page(), "run: python scripts/make_docs.py"


def test_log_begins_with_its_index(generator: ModuleType) -> None:
    """Every entry has date, title and verdict in its heading, and a line at the top."""
    log = (ROOT / "dev" / "LOG.md").read_text()
    headings = re.findall(r"^## .*$", log, re.MULTILINE)
    assert [heading for heading in headings if not generator.ENTRY.match(heading)] == []
    assert log == generator.filled(log), "run: python scripts/make_docs.py"


def test_every_page_is_in_the_reading_order() -> None:
    """And every page of docs/ is reached from README.md."""
    named = set(re.findall(r"\]\(([\w./-]+\.md)(?:#[^)]*)?\)", page("README.md")))
    pages = {str(path.relative_to(DOCS)) for path in DOCS.glob("*.md") if path.name != "README.md"}
    assert pages | {"decisions/README.md"} <= named
    assert "(docs/README.md)" in (ROOT / "README.md").read_text()


def test_glossary_says_one_sentence_each() -> None:
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", page("glossary.md"), re.MULTILINE)
    nouns = [noun for noun, _ in rows]
    assert nouns == sorted(nouns, key=str.lower)
    assert len(set(nouns)) == len(nouns) >= 50
    assert set(LIFECYCLES) <= {noun.lower() for noun in nouns}
    for noun, sentence in rows:
        assert re.fullmatch(r"[^.]+(?:\.\w[^.]*)*\.", sentence), f"{noun}: {sentence}"


def test_every_threat_names_tests_that_exist() -> None:
    table = page("security.md").partition("## Threats")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|") and "`" in line.rpartition(" | ")[2]]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`(\w+/test_\w+\.py)`", row)
        assert named, row
        for file in named:
            assert (ROOT / "tests" / file).exists(), file
