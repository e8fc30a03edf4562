"""Text of strangers on a terminal, in a log, in a sentence: nothing in it is markup, and nothing is obeyed."""

import io
import json
import logging
import queue
import subprocess
import sys

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from farflung.cli.app import complain
from farflung.dashboard.formats import clean
from farflung.launch.examples import Pair
from farflung.launch.logs import TEXT, Json, Lines
from farflung.launch.progress import Waits
from farflung.launch.screen import nodes_table, print_answers, run_panel
from farflung.launch.screen import one_line as status_line
from farflung.launch.terminal import Terminal
from farflung.ops import doctor
from farflung.protocol.errors import Malformed
from farflung.protocol.messages import Latest, NodeView, Status
from farflung.protocol.shown import OBEYED, one_line, visible

HOSTILE = "a\x1b]0;owned\x07\x1b[2Jb\x9b31m\u202eevil[/INST][bold]:smile:\r\x08"
"""A title, a cleared screen, C1, a direction, markup that closes what was never opened, an emoji, a line rewritten."""
SAFE = r"a\x1b]0;owned\x07\x1b[2Jb\x9b31m\u202eevil[/INST][bold]:smile:\r\x08"


def printed(*parts: object) -> str:
    """What a terminal in colour gets."""
    file = io.StringIO()
    console = Terminal(file=file, width=400, force_terminal=True, color_system=None, legacy_windows=False)
    for part in parts:
        console.print(part, soft_wrap=True)
    return file.getvalue()


def is_safe(text: str) -> bool:
    return not OBEYED.search(text)


def test_what_is_obeyed_is_written_out_and_all_else_stays() -> None:
    assert visible(HOSTILE) == SAFE
    assert visible("Grüße, 数\tone\ntwo [x] \\") == "Grüße, 数\tone\ntwo [x] \\"
    assert one_line("one\ntwo\t\x1b") == r"one\ntwo\t\x1b"
    assert visible("\ud800") == r"\ud800"


def test_pages_show_the_same() -> None:
    assert clean(HOSTILE) == SAFE


def test_nothing_printed_is_markup_or_obeyed() -> None:
    table = Table("a", box=None)
    table.add_row(HOSTILE)
    found = printed(HOSTILE, Text(HOSTILE), table, Panel(HOSTILE, title=Text(HOSTILE)))
    assert is_safe(found), repr(found)
    assert found.count("[/INST][bold]:smile:") == 5
    assert SAFE in found


def test_columns_stay_straight_beside_text_that_is_escaped() -> None:
    table = Table("a", "b", box=None)
    table.add_row("\x1b\x1b", "x")
    table.add_row("12345678", "x")
    _, first, second = printed(table).splitlines()
    assert first.index("x", 8) == second.index("x")


LISTS = ("steps", "evals", "verdicts", "warnings")


def node(**changes: object) -> NodeView:
    blank = {"node": "n1", "name": "", "role": "worker", "status": "trusted", "record": "", "phase": "", "lease": ""}
    counts = dict.fromkeys(("loaded_step", "accepted", "rejected", "audits", "credit", "escrow"), 0)
    floats = {"statistic": 0.0, "tokens_per_s": 0.0, "seen_s_ago": 0.0, "is_online": True}
    return NodeView(**blank | counts | floats | changes)  # type: ignore[arg-type]


def status_of(**told: object) -> Status:
    fields = dict.fromkeys(Status.__struct_fields__, 0) | {name: [] for name in LISTS} | {"audits": {}}
    return Status(**fields | {"latest": Latest(status="x", step=0, manifest="")} | told)  # type: ignore[arg-type]


def test_a_status_is_shown_whatever_nodes_and_operator_call_themselves() -> None:
    hostile = dict.fromkeys(("model", "env", "status", "run"), HOSTILE)
    status = status_of(**hostile, nodes=[node(name=HOSTILE, phase=HOSTILE, status=HOSTILE)])
    found = printed(run_panel(status), nodes_table(status, 400))
    assert "[/INST][bold]" in found
    assert is_safe(found.replace("\x1b[", "")), repr(found)


def test_answers_of_a_model_are_shown_as_they_are() -> None:
    file = io.StringIO()
    print_answers(Terminal(file=file, width=400), [Pair("[INST]1+1[/INST]", "\x1b[31m2", 1.0, "[/b]", 0.0)])
    assert "[INST]1+1[/INST]" in file.getvalue()
    assert r"\x1b[31m2" in file.getvalue()
    assert "[/b]" in file.getvalue()


def test_a_finding_may_quote_a_coordinator() -> None:
    file = io.StringIO()
    doctor.show(Terminal(file=file, width=400), doctor.Finding("descriptor", False, HOSTILE, HOSTILE))
    assert is_safe(file.getvalue())
    assert file.getvalue().count("[/INST][bold]:smile:") == 2


def test_an_error_is_one_sentence_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain(Malformed(f"bad {HOSTILE}\nfarflung: all is well")) == 2
    assert capsys.readouterr().err == f"farflung: bad {SAFE}\\nfarflung: all is well\n"


# --- a start ---------------------------------------------------------------------------------------------------------


def test_what_a_start_waits_for_is_said_at_once_and_again_until_it_is_over() -> None:
    said: queue.Queue[str] = queue.Queue()
    with Waits(said.put, again_s=0.01) as waits:
        waits("importing")
        assert said.get_nowait().endswith("s  importing …")
        assert said.get(timeout=30).endswith("s  still importing …")
        waits.over()
        waits._thread.join()
        waits("nothing")
    assert not any("nothing" in said.get_nowait() for _ in range(said.qsize()))


def test_the_command_says_what_it_does_before_it_imports_what_it_takes(tmp_path) -> None:
    """`farflung run` of a file that is not there: the line comes first, and by then nothing large is imported."""
    code = (
        "import sys; from farflung.launch import progress; say = progress.to_terminal\n"
        'def told(text): say(f\'{text} {"sqlalchemy" in sys.modules} {"torch" in sys.modules}\')\n'
        "progress.Waits.__init__.__defaults__ = (told, 60.0)\n"
        "from farflung.cli.app import app; import farflung.cli; app(['run', sys.argv[1]])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "missing.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    first = done.stdout.splitlines()[0]
    assert "missing.toml" in first
    assert first.endswith("False False"), "neither the database's library nor torch"


@pytest.mark.parametrize(
    ("step", "accepted", "phase", "word"),
    [
        (-1, 0, "starting up: loading the model", "the trainer is starting up: loading the model"),
        (-1, 0, "", "the trainer is starting up"),
        (0, 0, "waiting", "the first rollouts"),
        (0, 3, "waiting", ""),
    ],
)
def test_a_line_tells_what_a_run_without_results_waits_for(step, accepted, phase, word) -> None:
    latest = Latest(status="running", step=step, manifest="")
    nodes = [node(role="trainer", phase=phase)]
    line = status_line(status_of(latest=latest, accepted=accepted, nodes=nodes, status="running"))
    assert ("waits for" in line) is bool(word)
    assert word in line


def record(message: str, *args: object, **options: object) -> logging.LogRecord:
    return logging.LogRecord("farflung.x", logging.WARNING, "f.py", 1, message, args, options.get("exc_info"))  # type: ignore[arg-type]


def test_a_log_line_is_one_line() -> None:
    line = Lines(TEXT).format(record("no answer because=%s", f"{HOSTILE}\n2026-01-01 INFO forged"))
    assert is_safe(line)
    assert "\n" not in line
    assert line.endswith(rf"because={SAFE}\n2026-01-01 INFO forged")


def test_a_json_log_line_is_json_and_ascii() -> None:
    message = f'said="{HOSTILE}"\n\\'
    line = Json().format(record("%s", message))
    assert line.isascii()
    assert is_safe(line)
    assert "\n" not in line
    assert json.loads(line) | {"at": ""} == {
        "at": "", "level": "WARNING", "logger": "farflung.x", "message": message,
    }  # fmt: skip


@pytest.mark.parametrize("formatter", [Lines(TEXT), Json()])
def test_a_traceback_is_kept_and_tame(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        text = formatter.format(record("broken", exc_info=sys.exc_info()))
    assert is_safe(text)
    assert "ValueError" in text
