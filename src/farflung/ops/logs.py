"""How every process of the project logs. What strangers said stays within its line, and a terminal obeys none of it."""

import json as json_module
import logging

from farflung.protocol.shown import one_line, visible

TEXT = "%(asctime)s %(levelname)s %(name)s %(message)s"


class Lines(logging.Formatter):
    """One line per record; a traceback follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record's line."""
        return one_line(super().formatMessage(record))

    def formatException(self, ei: object) -> str:
        """A traceback, whose last line may quote a stranger."""
        return visible(super().formatException(ei))  # type: ignore[arg-type]


class Json(logging.Formatter):
    """One JSON object per record, in ASCII, so that nothing in it is obeyed and it always parses."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's line."""
        fields = {"at": self.formatTime(record), "level": record.levelname, "logger": record.name}
        fields["message"] = record.getMessage()
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_module.dumps(fields)


def start_logging(json: bool = False) -> None:
    """One line per change of state on standard error, as text or as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if json else Lines(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx2", "httpcore2", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
