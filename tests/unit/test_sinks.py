"""Optional sinks: nothing without a project, one sentence for a missing package."""

import importlib.util

import pytest

from farflung.config import Config, SinksSection
from farflung.protocol.errors import ConfigError
from farflung.store.sinks import KNOWN, Sinks


def test_without_projects_nothing_is_sent():
    sinks = Sinks(Config())
    sinks.log(1, {"reward": 0.5})
    sinks.finish()


@pytest.mark.parametrize("name", KNOWN)
def test_a_missing_package_is_named_with_its_command(name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    config = Config(sinks=SinksSection(**{f"{name}_project": "mine"}))
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        Sinks(config)
