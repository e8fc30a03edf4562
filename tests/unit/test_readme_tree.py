"""The code tells its own tree: docs/tree.md has each module, README.md each package, by their docstrings."""

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest
from tests.unit.test_docs import DOCS, ROOT, load_generator

PACKAGE = ROOT / "src" / "farflung"
README_BYTES = 12_000


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator()


def modules() -> dict[str, str]:
    """Path → docstring of every module and package that says anything."""
    found = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    return {
        str((path.parent if path.name == "__init__.py" else path).relative_to(ROOT)): ast.get_docstring(tree) or ""
        for path, tree in ((path, ast.parse(text)) for path, text in found.items())
        if path != PACKAGE / "__init__.py"
    }


def test_tree_page_is_what_the_docstrings_say(generator: ModuleType) -> None:
    assert (DOCS / "tree.md").read_text() == generator.tree_page(), "run: python scripts/make_docs.py"


def test_every_module_has_its_phrase() -> None:
    """A docstring whose first line is whole by itself, short, and no other module's."""
    phrases = {path: text.partition("\n")[0] for path, text in modules().items()}
    poor = [path for path, phrase in phrases.items() if not re.fullmatch(r".{15,118}[.?]", phrase)]
    assert poor == [], "the first line of each docstring is its phrase in docs/tree.md: one line that ends a sentence"
    assert len(set(phrases.values())) == len(phrases)
    told = re.findall(r"\]\(\.\./([^)]+)\)", (DOCS / "tree.md").read_text())
    assert set(phrases) <= set(told)
    assert all(Path(ROOT / path).exists() for path in told)


def test_readme_is_short_and_names_every_package(generator: ModuleType) -> None:
    """A package is a folder or a module at the top; each has a line of its own, with words."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= README_BYTES
    assert readme == generator.filled(readme), "run: python scripts/make_docs.py"
    lines = re.findall(r"^├── (\S+) +(\S.*)$", readme, re.MULTILINE)
    top = {path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    names = {path.name + "/" * path.is_dir() for path in top if path.name != "__init__.py"}
    assert sorted(name for name, _ in lines) == sorted(names)
