"""A run is copied while it goes, brought back elsewhere, and goes on there; what no row names is collected."""

import asyncio
import shutil
import subprocess
import sys
import threading
import time

import pytest
import sqlalchemy as sa

from farflung.config import save
from farflung.ops import backup
from farflung.ops.invariants import violations
from farflung.protocol.digest import digest_of
from farflung.protocol.errors import ConfigError, Rejected
from farflung.protocol.messages import Submission
from farflung.store.tables import SUBMISSIONS


def test_a_run_that_was_copied_while_it_went_goes_on_elsewhere(make_house, tmp_path, monkeypatch) -> None:
    house = make_house(lease={"ahead": 16.0})
    copied = tmp_path / "copy"
    snapshot, worked = backup._copy_database, threading.Event()

    def slow(file, to) -> None:
        assert worked.wait(60)  # keys and checkpoints are copied by then, and more has been submitted
        snapshot(file, to)

    monkeypatch.setattr(backup, "_copy_database", slow)

    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada", 2)
        copying = asyncio.create_task(asyncio.to_thread(asyncio.run, backup.back_up(house.config, copied)))
        rounds = 0
        while not copying.done():
            if (lease := await house.ask("ada")) is not None:
                await house.submit("ada", lease)
            await house.audit()
            await house.score()
            rounds += 1
            if rounds == 2:
                worked.set()
            await asyncio.sleep(0.02)
        assert "backed up run 'test'" in await copying
        assert rounds >= 2

    house.run(scenario)
    before = len(house.rows(sa.select(SUBMISSIONS)))
    said = asyncio.run(backup.restore(copied, tmp_path / "elsewhere"))
    assert "--resume" in said
    config = house.config.model_copy(
        update={"run": house.config.run.model_copy(update={"dir": tmp_path / "elsewhere"})}
    )
    again = asyncio.run(type(house).open(config, house.clock))

    async def goes_on(again) -> None:
        assert 2 <= len(again.rows(sa.select(SUBMISSIONS))) <= before
        assert await again.ctx.database.read(lambda c: violations(c, config)) == []
        for step in (1, 2):
            while (batch := await again.claim_step(step)) is None:
                if (lease := await again.ask("bob")) is not None:
                    await again.submit("bob", lease)
                await again.audit()
                await again.score()
            await again.commit(batch)
        assert await again.ctx.database.read(lambda c: violations(c, config)) == []

    again.run(goes_on)
    again.close()


def test_a_backup_that_does_not_hold_together_is_not_restored(house, tmp_path) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")

    house.run(scenario)
    asyncio.run(backup.back_up(house.config, tmp_path / "copy"))
    with pytest.raises(ConfigError, match="exists already"):
        asyncio.run(backup.back_up(house.config, tmp_path / "copy"))
    body = next(path for path in (tmp_path / "copy" / "blobs" / "submissions").glob("*/*"))
    good = body.read_bytes()
    for spoil, why in ((lambda: body.write_bytes(good[:-1]), "does not have its digest"), (body.unlink, "is missing")):
        spoil()
        with pytest.raises(ConfigError, match=why):
            asyncio.run(backup.restore(tmp_path / "copy", tmp_path / "elsewhere"))
        assert not (tmp_path / "elsewhere" / "test").exists()
    with pytest.raises(ConfigError, match="is no backup"):
        asyncio.run(backup.restore(tmp_path, tmp_path / "elsewhere"))


def test_a_run_whose_store_lost_something_is_not_called_backed_up(house, tmp_path) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")

    house.run(scenario)
    shutil.rmtree(house.config.folder / "blobs" / "submissions")
    with pytest.raises(ConfigError, match="1 blobs of run 'test' are gone"):
        asyncio.run(backup.back_up(house.config, tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_bodies_of_refused_submissions_are_collected_and_others_stay(house) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        lease = (await house.work("ada"))[0]
        kept = house.ctx.archive.blobs
        orphan = await kept.put(b"the body of a submission that was refused")
        other = await house.lease("bob")
        with pytest.raises(Rejected):
            await house.submit("bob", other, Submission(rollouts=house.honest(lease).rollouts))
        before = {digest async for digest, _ in kept.stored()}
        assert await house.coordinator.sweeper.tidy_once(time.time()) == 0, "it may be about to get its row"
        assert await house.coordinator.sweeper.tidy_once(time.time() + 3700 + house.config.lease.lease_s) == 1
        assert {digest async for digest, _ in kept.stored()} == before - {orphan}
        assert digest_of(b"the body of a submission that was refused") == orphan

    house.run(scenario)


def test_both_commands_say_what_came_of_it(house, tmp_path) -> None:
    async def scenario(house) -> None:
        await house.step(0)
        await house.work("ada")

    house.run(scenario)
    save(house.config, house.config.folder / "config.json")

    def farflung(*arguments: object) -> tuple[int, str]:
        command = [sys.executable, "-m", "farflung", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = farflung("backup", house.config.folder / "config.json", "--to", tmp_path / "copy")
    assert (code, "backed up run 'test'" in said) == (0, True), said
    code, said = farflung("restore", tmp_path / "copy", "--to", tmp_path / "elsewhere")
    assert (code, "restored to" in said) == (0, True), said
    code, said = farflung("restore", tmp_path / "copy", "--to", tmp_path / "elsewhere")
    assert (code, "exists already" in said) == (2, True), said
    shown = house.config.model_copy(
        update={
            "coordinator": house.config.coordinator.model_copy(update={"database": "postgresql://nobody@nowhere/x"})
        }
    )
    save(shown, house.config.folder / "config.json")
    code, said = farflung("backup", house.config.folder / "config.json", "--to", tmp_path / "other")
    assert (code, "use pg_dump" in said) == (2, True), said
