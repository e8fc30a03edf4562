"""Which keys speak for a run: what the root delegates is accepted, what it does not, or no more, is refused."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from farflung.net.session import PURPOSES, RunKeys, Session, check_run, delegate
from farflung.protocol.errors import BadSignature, ConfigError
from farflung.protocol.identity import Key, Signed, seal
from farflung.protocol.messages import Run, RunInfo
from farflung.protocol.numerics import NOISE
from farflung.tasks import keyring

ROOT, OTHER, KEY = Key(b"r" * 32), Key(b"o" * 32), Key(b"k" * 32)
NOW, DAY_S = time.time(), 86_400.0


def info(noise: str = NOISE) -> RunInfo:
    return RunInfo(
        run="test", coordinator=KEY.id, status="running", version=1, profile="", profiles={}, dtype="float32", vocab=32,
        eos_ids=[2], model_files=[], max_staleness=2, heartbeat_s=1.0, noise=noise,
    )  # fmt: skip


def descriptor(*instead: Signed, root: Key = ROOT) -> Run:
    """A run's descriptor; some delegations may be replaced by others, which come last."""
    usual = [delegate(root, "test", purpose, KEY.public, NOW + DAY_S) for purpose in PURPOSES]
    return Run(root=root.public, delegations=[*usual[len(instead) :], *instead], info=seal(KEY, "run", info()))


def test_delegated_keys_are_known_by_purpose() -> None:
    found = check_run(descriptor(), "test", ROOT.public)
    assert all(found.keys(purpose, NOW) == [KEY.public] for purpose in PURPOSES)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (delegate(ROOT, "test", "coordinator", KEY.public, NOW - 1), "coordinator, or it has expired"),
        (delegate(ROOT, "other", "coordinator", KEY.public, NOW + DAY_S), "no key for coordinator"),
        (delegate(OTHER, "test", "coordinator", KEY.public, NOW + DAY_S), "not by"),
    ],
    ids=["expired", "for another run", "by another root"],
)
def test_what_the_root_does_not_say_is_refused(wrong: Signed, why: str) -> None:
    with pytest.raises(BadSignature, match=why):
        check_run(descriptor(wrong), "test", ROOT.public)


def test_another_root_is_refused() -> None:
    with pytest.raises(BadSignature, match="not by"):
        check_run(descriptor(root=OTHER), "test", ROOT.public)


def test_a_run_with_another_noise_is_refused() -> None:
    answer = msgspec.structs.replace(descriptor(), info=seal(KEY, "run", info("philox")))
    with pytest.raises(ConfigError, match="noise 'philox', this version of farflung has 'vllm-murmur3'"):
        check_run(answer, "test", ROOT.public)


def test_a_key_expires_during_a_stay() -> None:
    found = check_run(descriptor(), "test", None)
    assert found.keys("weights", NOW + DAY_S + 1) == []


class Line:
    """What a session needs of a client: it answers with the descriptor as they are at the time."""

    def __init__(self, answer: Run) -> None:
        self.answer, self.asked = answer, 0

    async def get(self, path: str, type: type[Run]) -> Run:
        self.asked += 1
        return self.answer


def session(line: Line) -> Session:
    return Session(line, "test", ROOT.public, check_run(descriptor(), "test", None))  # type: ignore[arg-type]


def test_a_node_learns_of_a_rotated_key_when_it_meets_it() -> None:
    line = Line(descriptor(delegate(ROOT, "test", "weights", OTHER.public, NOW + DAY_S)))
    line.answer = Run(
        root=ROOT.public,
        delegations=[*descriptor().delegations, delegate(ROOT, "test", "weights", OTHER.public, NOW + DAY_S)],
        info=descriptor().info,
    )
    node, document = session(line), seal(OTHER, "run", info())
    assert asyncio.run(node.keys("weights", seal(KEY, "run", info()))) == [KEY.public]
    assert line.asked == 0
    assert OTHER.public in asyncio.run(node.keys("weights", document))
    assert line.asked == 1


def test_a_stranger_stays_a_stranger_however_often_the_papers_are_read() -> None:
    node = session(Line(descriptor()))
    assert OTHER.public not in asyncio.run(node.keys("weights", seal(OTHER, "run", info())))


def test_new_papers_of_another_root_are_refused() -> None:
    node = session(Line(descriptor(root=OTHER)))
    with pytest.raises(BadSignature):
        asyncio.run(node.keys("weights", seal(OTHER, "run", info())))


# --- the operator's side ---------------------------------------------------------------------------------------------


def made(folder: Path) -> dict[str, bytes]:
    publics = {purpose: Key.load_or_make(folder / name).public for purpose, name in keyring.FILES.items()}
    keyring.delegated(folder, "test", publics, NOW)
    return publics


def test_once_delegated_a_run_starts_without_the_root(tmp_path: Path) -> None:
    publics = made(tmp_path)
    (tmp_path / "root").unlink()
    assert keyring.delegated(tmp_path, "test", publics, NOW).live("test", "weights", NOW) == [publics["weights"]]
    assert not (tmp_path / "root").exists()


def test_without_the_root_no_other_key_is_delegated(tmp_path: Path) -> None:
    publics = made(tmp_path)
    (tmp_path / "root").unlink()
    with pytest.raises(ConfigError, match="farflung keys rotate"):
        keyring.delegated(tmp_path, "test", publics | {"weights": OTHER.public}, NOW)
    with pytest.raises(ConfigError, match="or no more"):
        keyring.delegated(tmp_path, "test", publics, NOW + keyring.LASTS_S + 1)


@pytest.mark.parametrize("revoke", [False, True])
def test_rotation_keeps_the_old_key_until_it_expires_unless_it_is_revoked(revoke: bool, tmp_path: Path) -> None:
    publics = made(tmp_path)
    root = Key.load_or_make(tmp_path / "root")
    found = keyring.rotate(tmp_path, "test", "weights", root, NOW, DAY_S, revoke=revoke)
    assert found == Key.load_or_make(tmp_path / "trainer").public != publics["weights"]
    ring = keyring.delegated(tmp_path, "test", publics | {"weights": found}, NOW)
    assert ring.live("test", "weights", NOW) == ([found] if revoke else [publics["weights"], found])
    assert found not in ring.live("test", "weights", NOW + DAY_S + 1)
    assert ring.live("test", "verdicts", NOW) == [publics["verdicts"]]


def test_another_root_cannot_rotate(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(ConfigError, match="vouched for by root"):
        keyring.rotate(tmp_path, "test", "weights", OTHER, NOW, DAY_S, revoke=False)


def test_papers_name_the_live_keys_only() -> None:
    old, new = (delegate(ROOT, "test", "weights", KEY.public, NOW + age) for age in (-1, 1))
    assert keyring.Keyring(ROOT.public, (old, new)).live_signed(NOW) == [new]
    assert RunKeys(info(), ()).keys("weights", NOW) == []


@pytest.mark.parametrize("data", [b"{}", b"[", b'["\xff"]', b"\xff\xfe"])
def test_a_file_that_is_no_list_of_delegations_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "delegations.json").write_bytes(data)
    with pytest.raises(ConfigError, match="no list of delegations"):
        keyring.read(tmp_path)
