"""One word for an idea, and that the field's: words that went are in no code, no command and no page of the docs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from farflung.config import renamed

ROOT = Path(__file__).parents[2]
GONE = re.compile(
    r"""(?<![A-Za-z])(offices?|doors|teller|papers|parcels?|veil(ed)?|brakes?|sift(ed|s)?|nurser(y|ies)|shelf|shelves|orphans?
    |patiently|roomy|hasten|storms?|crowds?|guests?|crews?|seats?|hurry|pulses?|standing|consequences|heat|deserters)
    (?![A-Za-z])""",
    re.IGNORECASE | re.VERBOSE,
)
"""Words that went altogether, as words and as parts of snake_case."""
NAMES = re.findall(
    r"\w+",
    """
    ask beat budget brake choice collect compose consequences crew deal delivery documents figures found guests hall
    hasten head heap heat hurry judge kept line look mixed nursery numbers obey odd office offers order orphans papers
    parcel part patiently piece pieces pulse queue reach room seat shelf sift standing stay storm teller told trouble
    troubles veil way
    """,
)
"""English words that are the name of no module, class, function or setting; a variable in a function may have them."""
IN_CAMEL = {"Book", "Crew", "Doors", "Office", "Papers", "Parcel", "Pulse", "Roomy", "Teller", "Trouble", "Veil"}
OTHERS = {
    "audits/budget.py:budget",  # of audits
    "cli/look.py:look",  # the group of commands
    "net/metrics_server.py:collect",  # prometheus_client's word
    "dashboard/prometheus.py:collect",
}
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
SOURCES = [path for path in (ROOT / "src").rglob("*") if path.suffix in {".py", ".html", ".js", ".css", ".sql"}]


def short(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "farflung").as_posix()


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_that_went_are_nowhere(path: Path) -> None:
    if path.name == "renamed.py":
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if GONE.search(line.replace("_", " "))]
    assert not found, f"{path}: {found[:3]}"


def names(path: Path) -> Iterator[str]:
    """Of the module, its classes and functions, and the fields of its classes."""
    yield path.stem
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (
                one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and hasattr(one.target, "id")
            )


def test_no_module_class_function_or_setting_has_a_name_that_went() -> None:
    of_code = [(path, name) for path in SOURCES if path.suffix == ".py" for name in names(path)]
    found = [f"{short(path)}:{name}" for path, name in of_code if name.strip("_").lower() in NAMES]
    found += [f"{short(p)}:{name}" for p, name in of_code if set(re.findall(r"[A-Z][a-z]+", name)) & IN_CAMEL]
    assert not set(found) - OTHERS


def test_somebody_is_named() -> None:
    said = [
        path for path in SOURCES for _ in re.findall(r"\b(?:nobody|somebody|whoever|whom)\b", path.read_text(), re.I)
    ]
    assert len(said) <= 10, {path.name for path in said}


def test_old_words_of_settings_and_commands_lead_to_the_new_ones() -> None:
    from farflung.cli import app
    from farflung.config import fields

    assert not set(renamed.SETTINGS) & {name for name, _ in fields()}
    assert set(renamed.SETTINGS.values()) <= {name for name, _ in fields()}
    assert all(name in app for name in renamed.COMMANDS.values())
    assert not any(old in app for old in renamed.COMMANDS)
