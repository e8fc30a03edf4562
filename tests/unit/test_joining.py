"""Who may join, and what an address is: pure checks."""

import msgspec
import pytest

from farflung.config import CoordinatorSection
from farflung.ops.join import parse
from farflung.protocol.errors import ConfigError, Forbidden, TooOld
from farflung.protocol.messages import VERSION, Register
from farflung.tasks.admit import check

WORKER = Register(version=VERSION)
ROOT = "ab" * 32


def test_an_open_run_takes_workers_and_relays_but_no_trusted_role_without_a_grant() -> None:
    check(CoordinatorSection(), "", "n1", WORKER)
    check(CoordinatorSection(), "", "n1", Register(version=VERSION, role="relay"))
    check(CoordinatorSection(), "validator", "n1", Register(version=VERSION, role="validator"))
    for granted in ("", "scorer"):
        with pytest.raises(Forbidden, match="not granted the role 'validator'"):
            check(CoordinatorSection(), granted, "n1", Register(version=VERSION, role="validator"))


def test_an_invited_run_takes_whoever_brings_a_token() -> None:
    settings = CoordinatorSection(admission="invite", invites=("sesame", "open"))
    check(settings, "", "n1", msgspec.structs.replace(WORKER, invite="sesame"))
    for token in ("", "sesam", "sesame ", "é"):
        with pytest.raises(Forbidden, match="--invite TOKEN"):
            check(settings, "", "n1", msgspec.structs.replace(WORKER, invite=token))


def test_an_invited_run_without_tokens_takes_nobody() -> None:
    with pytest.raises(Forbidden):
        check(CoordinatorSection(admission="invite"), "", "n1", WORKER)


def test_a_listed_run_takes_listed_nodes_and_says_what_to_tell_the_operator() -> None:
    settings = CoordinatorSection(admission="allow", allow=("n1",))
    check(settings, "", "n1", WORKER)
    with pytest.raises(Forbidden, match="add n2 to"):
        check(settings, "", "n2", WORKER)


def test_an_old_node_is_told_to_upgrade() -> None:
    with pytest.raises(TooOld, match="pip install -U farflung"):
        check(CoordinatorSection(minimum_version=VERSION + 1), "", "n1", WORKER)


@pytest.mark.parametrize(
    ("address", "url", "root"),
    [
        (f"https://host:7000#{ROOT}", "https://host:7000", bytes.fromhex(ROOT)),
        (f"http://127.0.0.1:7000/#{ROOT}", "http://127.0.0.1:7000", bytes.fromhex(ROOT)),
        ("host:7000", "http://host:7000", None),
    ],
)
def test_an_address_is_a_url_and_perhaps_a_root(address: str, url: str, root: bytes | None) -> None:
    assert parse(address) == (url, root)


@pytest.mark.parametrize(
    "address", ["https://host#abc", "https://host#zz", "ftp://host", "https://", f"http://h#{ROOT}00"]
)
def test_a_broken_address_is_one_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=r"address|root key"):
        parse(address)
