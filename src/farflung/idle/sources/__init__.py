"""What tells about the owner and the machine: each source says what it sees, or why it sees nothing."""

from collections.abc import Callable
from typing import NamedTuple


class Missing(NamedTuple):
    """Why a source tells nothing, and what would help, if anything would."""

    why: str
    mend: str = ""


Source = Callable[[], float | Missing]
"""Of true or false, 1 or 0."""
WITH_EXTRA = "pip install 'farflung[idle]'"
