"""`farflung engine install`: an environment of its own for an engine that is not ours, as its versions ask for."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from farflung.engine.vllm_process import MADE_FOR_OTHERS, PINS, READY
from farflung.numerics.devices import best
from farflung.protocol.errors import ConfigError


def install(home: Path) -> str:
    """Make it, or bring it up to date; pip tells what it does. Gives a sentence. Raises ConfigError."""
    home = home.expanduser().resolve()
    (home / READY).unlink(missing_ok=True)
    kind = best()
    if not (home / "bin" / "python").exists():
        _run([sys.executable, "-m", "venv", str(home)])
    python = str(home / "bin" / "python")
    _run([python, "-m", "pip", "install", *PINS.get(kind, PINS["else"])])
    if kind == "cpu":
        _run([python, "-m", "pip", "uninstall", "--yes", *MADE_FOR_OTHERS])
    found = _run([python, "-c", "import vllm, torch; print('vLLM', vllm.__version__, 'with torch', torch.__version__)"])
    (home / READY).touch()
    return f"{found.splitlines()[-1]} is in {home}; `farflung join ADDRESS --engine vllm` starts it"


def _run(command: Sequence[str]) -> str:
    """Run and show what it says. Raises ConfigError if it fails."""
    sys.stderr.write(f"$ {' '.join(command)}\n")
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            lines.append(line.rstrip())
    if process.returncode:
        last = next((line for line in reversed(lines) if line), "it said nothing")
        raise ConfigError(f"{' '.join(command[:5])} ended with {process.returncode}: {last}")
    return "\n".join(lines)
