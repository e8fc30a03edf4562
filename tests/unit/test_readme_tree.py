"""The tree in the README names every file under src/farflung and no other, one phrase each."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"(?P<indent>(?:[│ ]   )*)[├└]── (?P<name>\S+)\s+(?P<phrase>\S.*)")

WHOLE = ("dashboard/static/", "dashboard/templates/")
"""Folders of many small files of one kind, told in one line each."""


def told() -> dict[str, str]:
    """Path → phrase, as the README has them."""
    readme = (ROOT / "README.md").read_text()
    block = readme.split("```text\nsrc/farflung/\n", 1)[1].split("```", 1)[0]
    folders: list[str] = []
    found: dict[str, str] = {}
    for line in block.splitlines():
        match = LINE.fullmatch(line)
        assert match, f"no name with a phrase: {line!r}"
        del folders[len(match["indent"]) // 4 :]
        if match["name"].endswith("/"):
            folders.append(match["name"])
            if "".join(folders) in WHOLE:
                found["".join(folders)] = match["phrase"]
        else:
            found["".join(folders) + match["name"]] = match["phrase"]
    return found


def test_every_file_has_its_phrase() -> None:
    root = ROOT / "src" / "farflung"
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    paths = {str(path.relative_to(root)) for path in files if path.name != "__init__.py" or path.stat().st_size}
    assert set(told()) == {next((folder for folder in WHOLE if path.startswith(folder)), path) for path in paths}


def test_phrases_are_short_and_differ() -> None:
    phrases = list(told().values())
    assert all(len(phrase) <= 90 for phrase in phrases)
    assert len(set(phrases)) == len(phrases)
