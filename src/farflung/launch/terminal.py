"""The terminal of every command: all output is text, and nothing in it is markup or obeyed."""

import os
import stat
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from farflung.protocol.shown import visible


class Terminal(Console):
    """A console without markup; style what needs it by `Text`. Control characters come out as their escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as text, in tables and panels too: escaped before it is laid out, so that columns stay straight."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: Any = None) -> Iterable[Segment]:
        """The last gate, for whatever is no string, such as `Text`; rich's own movements of the cursor pass."""
        for part in super().render(renderable, options):
            yield part if part.control else Segment(visible(part.text), part.style)


def let_go_of_lost() -> None:
    """After a terminal is closed what is printed goes nowhere, where it would fail: the last words are in files too."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
