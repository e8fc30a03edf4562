"""How every process of the project logs."""

import logging


def start_logging(json: bool = False) -> None:
    """One line per change of state on standard error, as text or as JSON."""
    text = "%(asctime)s %(levelname)s %(name)s %(message)s"
    machine = '{"at": "%(asctime)s", "level": "%(levelname)s", "logger": "%(name)s", "message": "%(message)s"}'
    logging.basicConfig(level=logging.INFO, format=machine if json else text)
    for noisy in ("httpx2", "httpcore2", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
