"""Every command, in groups: run, join, look, keep safe, try to break, roles. Each is a few lines."""

import io
import locale
import os
import sys

from farflung.cli import lending, look, roles, runs, safety  # noqa: F401 (they register their commands)
from farflung.cli.app import app, complain
from farflung.config import renamed
from farflung.protocol.errors import ConfigError, FarflungError

__all__ = ["app", "main"]


def main() -> None:
    """Run one command; a cause that the user can mend is told in one sentence, with exit code 2."""
    _speak_utf8()
    # Read once, as torch is imported: a thread that waits for another soon gives its core to the roles beside it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        _refuse_renamed(sys.argv[1:2])
        app()
    except FarflungError as error:
        sys.exit(complain(error))
    except BrokenPipeError:  # the reader of our output has gone
        os._exit(141)
    except OSError as error:
        sys.exit(complain(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse_renamed(command: list[str]) -> None:
    for old in command:
        if name := renamed.COMMANDS.get(old):
            raise ConfigError(f"unknown command {old!r}; it is called `farflung {name}`")


def _speak_utf8() -> None:
    """Read and write files in UTF-8 in any locale, here and in children; signs that a stream lacks are escaped."""
    os.environ["PYTHONUTF8"] = "1"
    if not sys.flags.utf8_mode and os.name == "posix" and locale.getencoding().lower() != "utf-8":
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
