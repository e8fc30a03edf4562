"""The command line. Each command is a few lines: read the configuration, start the role, say what went wrong."""

import os
import sys

from farflung.cli import look, roles, runs, safety  # noqa: F401 (they register their commands)
from farflung.cli.app import app, complain
from farflung.protocol.errors import FarflungError

__all__ = ["app", "main"]


def main() -> None:
    """Run one command; whatever the user can mend is one sentence and exit code 2."""
    # Read once, as torch is imported: a thread that waits for another soon gives its core to the roles beside it.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except FarflungError as error:
        sys.exit(complain(error))
    except KeyboardInterrupt:
        sys.exit(130)
