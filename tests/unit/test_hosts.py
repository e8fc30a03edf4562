"""Which Host headers are this server's, and what listens for this machine alone."""

import pytest

from farflung.config import Config
from farflung.coordinator.process import refuse_guessable
from farflung.launch.swarm import prepare
from farflung.net.hosts import is_known, is_loopback, url_of
from farflung.protocol.errors import ConfigError


@pytest.mark.parametrize(
    "host",
    [
        "", "127.0.0.1", "127.0.0.1:80", "8.8.8.8:7000", "[::1]", "[::1]:7000", "[fd00::2]", "localhost", "LOCALHOST:1",
        "a.b.localhost", "coordinator:8000", "my-box", "testserver", "run.example.org", "run.example.org.:443",
    ],
)  # fmt: skip
def test_known(host: str) -> None:
    assert is_known(host, frozenset({"run.example.org"}))


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8000", "127.0.0.1.evil.example", "run.example.org.evil.example", "localhost.evil",
        "[::1", "127.1", "0x7f.1", "1.2.3", "évil", "a b", "run.example.org:80:80",
    ],
)  # fmt: skip
def test_unknown(host: str) -> None:
    assert not is_known(host, frozenset({"run.example.org"}))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "8.8.8.8", "example.org", "", "127.0.0.1.example"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def config(**coordinator: object) -> Config:
    return Config.model_validate({"run": {"reproducible": True}, "coordinator": coordinator})


@pytest.mark.parametrize("coordinator", [{"host": "0.0.0.0"}, {"host": "::"}, {"proxies": ["10.0.0.1"]}])
def test_a_secret_that_follows_from_a_seed_is_for_this_machine_alone(coordinator: dict[str, object]) -> None:
    for refuse in (refuse_guessable, prepare):
        with pytest.raises(ConfigError, match=r"set run\.reproducible = false, or coordinator\.host = 127\.0\.0\.1"):
            refuse(config(**coordinator))
    refuse_guessable(config())
    refuse_guessable(Config.model_validate({"coordinator": coordinator}))


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:8"), ("::1", "http://[::1]:8"), ("::", "http://[::]:8"), ("box", "http://box:8")],
)
def test_an_ipv6_address_stands_in_brackets(host: str, url: str) -> None:
    assert url_of("http", host, 8) == url
