"""Blobs behave the same in a folder and in S3."""

import asyncio
from pathlib import Path

import pytest

from farflung.protocol.digest import digest_of
from farflung.protocol.errors import ConfigError, NotFound, Unavailable
from farflung.store.blobs import Blobs

DATA = bytes(range(256)) * 10


def test_what_is_put_is_got_whole_and_by_range(blobs_url: str) -> None:
    async def scene() -> None:
        blobs = Blobs(blobs_url)
        digest = await blobs.put(DATA)
        assert digest == digest_of(DATA)
        assert await blobs.put(DATA) == digest
        assert await Blobs(blobs_url).get(digest) == DATA
        assert await blobs.size(digest) == len(DATA)
        assert await blobs.get_range(digest, 100, 300) == DATA[100:300]

    asyncio.run(scene())


def test_what_is_there_is_never_written_over(blobs_url: str) -> None:
    async def scene() -> None:
        blobs = Blobs(blobs_url)
        digest = await blobs.put(DATA)
        assert await blobs.put(b"something else", digest) == digest
        assert await blobs.get(digest) == DATA

    asyncio.run(scene())


def test_what_is_not_there_is_not_found(blobs_url: str) -> None:
    async def scene() -> None:
        blobs, absent = Blobs(blobs_url), "0" * 64
        for ask in (blobs.get(absent), blobs.size(absent), blobs.get_range(absent, 0, 1)):
            with pytest.raises(NotFound, match=absent):
                await ask
        digest = await blobs.put(DATA)
        await blobs.delete([absent, digest])
        with pytest.raises(NotFound):
            await blobs.size(digest)

    asyncio.run(scene())


def test_a_store_that_is_away_says_come_back(new_s3, monkeypatch) -> None:
    from farflung.store import blobs as module

    monkeypatch.setattr(module, "S3_PATIENCE", module.timedelta(seconds=1))
    away = Blobs("s3://bucket/folder?endpoint=http://127.0.0.1:9&region=us-east-1")
    with pytest.raises(Unavailable, match="cannot be stored") as told:
        asyncio.run(away.put(DATA))
    assert told.value.retry_after_s == 1


def test_a_url_that_names_no_store_says_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="none of file, memory and s3"):
        Blobs("ftp://somewhere")
    with pytest.raises(ConfigError, match="takes endpoint and region, not key"):
        Blobs("s3://bucket/folder?key=secret")


@pytest.mark.parametrize("left", [b"", bytes(len(DATA)), DATA[:-1]], ids=["empty", "zeros", "cut"])
def test_what_a_power_cut_has_spoiled_is_stored_again(tmp_path: Path, left: bytes) -> None:
    async def scene() -> bytes:
        blobs = Blobs(f"file://{tmp_path}")
        digest = await blobs.put(DATA)
        (tmp_path / digest[:2] / digest).write_bytes(left)
        await blobs.put(b"something else", digest)
        assert await blobs.get(digest) == left, "what is no better is not taken"
        await blobs.put(DATA, digest)
        return await blobs.get(digest)

    assert asyncio.run(scene()) == DATA
