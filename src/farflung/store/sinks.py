"""Sinks for step metrics besides metrics.jsonl: Weights & Biases and Trackio, if installed and asked for."""

import importlib
from collections.abc import Mapping
from typing import Any

from farflung.config import Config
from farflung.protocol.errors import ConfigError

KNOWN = ("wandb", "trackio")
"""Packages with the same three calls: init(project=, name=, config=), log(figures, step=), finish()."""


class Sinks:
    """The sinks of one run; with none configured, every call does nothing."""

    def __init__(self, config: Config) -> None:
        chosen = {name: project for name in KNOWN if (project := getattr(config.sinks, f"{name}_project"))}
        self._sinks = [_open(name, project, config) for name, project in chosen.items()]

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send one step's figures."""
        for sink in self._sinks:
            sink.log(dict(figures), step=step)

    def finish(self) -> None:
        """Send what is left."""
        for sink in self._sinks:
            sink.finish()


def _open(name: str, project: str, config: Config) -> Any:
    try:
        sink = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"sinks.{name}_project is set, but {name} is not installed; pip install {name}") from error
    sink.init(project=project, name=config.run.name, config=config.model_dump(mode="json"))
    return sink
