"""Which relays a node asks: none inside its own network that a stranger named."""

import asyncio

import pytest

from farflung.protocol.errors import ConfigError
from farflung.weights.url_policy import check_url

OPEN, INNER = "https://8.8.8.8:8443", "http://10.0.0.5:8443"
INSIDE = [
    "http://127.0.0.1:22", "http://localhost:80", "http://10.1.2.3", "http://192.168.0.1", "http://169.254.169.254/latest",
    "http://[::1]:5000", "http://[fe80::1]", "http://[fd00::2]:80", "http://[::ffff:192.168.0.1]", "http://0.0.0.0:1",
    "http://100.64.0.1", "http://2130706433",
]  # fmt: skip


@pytest.mark.parametrize("url", INSIDE)
def test_a_run_in_the_open_sends_nobody_inside(url):
    with pytest.raises(ConfigError, match="private network"):
        asyncio.run(check_url(url, OPEN))


@pytest.mark.parametrize("url", INSIDE)
def test_a_run_inside_may(url):
    asyncio.run(check_url(url, INNER))


@pytest.mark.parametrize("coordinator", [OPEN, INNER])
def test_public_addresses_are_always_asked(coordinator):
    asyncio.run(check_url("http://8.8.4.4:7000", coordinator))
    asyncio.run(check_url("http://[2001:4860:4860::8888]:7000", coordinator))


@pytest.mark.parametrize("url", ["http://no-such-machine.invalid", "http://" + "a" * 300, "http://[::1", "http://"])
def test_what_is_no_machine_is_refused_with_its_name(url):
    with pytest.raises(ConfigError, match=r"no machine|private network"):
        asyncio.run(check_url(url, OPEN))
