"""A run of a tiny model in this process: a coordinator on a socket, and real roles as tasks and threads."""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from tests.conftest import BASE, House, named, settings
from tests.served import Now, Served
from transformers import PreTrainedModel

from farflung.config import ValidatorSection
from farflung.store.db import migrate
from farflung.store.tables import STEPS
from farflung.trainer import Trainer
from farflung.validator import Validator

IDS = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""Of the demo's tokenizer."""


def save(model: PreTrainedModel, folder: Path) -> Path:
    """The model with the demo's tokenizer."""
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    return folder


@contextlib.contextmanager
def tiny_run(folder: Path, model: Path, /, **changes: dict[str, Any]) -> Iterator[Served]:
    """A coordinator with a run of this model."""
    trust = {"canaries": 0, "self_test": 0} | changes.pop("trust", {})
    more = changes.pop("model", {})
    config = settings(folder, model={"path": str(model)} | more, eval={"tasks": 0}, trust=trust, **changes)
    config.folder.mkdir()
    migrate(config.database_url)
    site = Served(asyncio.run(House.open(config, Now())))
    try:
        yield site
    finally:
        site.close()
        site.house.close()


@contextlib.asynccontextmanager
async def living(*roles: Any) -> AsyncIterator[None]:
    """While all of these live; each must end well by itself, and one that fails ends all."""
    async with asyncio.TaskGroup() as group:
        for role in roles:
            group.create_task(role.run())
        yield


def play(site: Served, folder: Path, *workers: Any, may_score: Callable[[], bool] = lambda: True) -> None:
    """The whole run with these workers, a trainer and a validator; every second sample of a group is right."""
    trainer = Trainer(site.url, named("trainer"), site.house.config)
    validator = Validator(site.url, named("val-1"), folder / "val-1", ValidatorSection(linger_s=0), name="val-1")
    training = threading.Thread(target=lambda: asyncio.run(trainer.run()), daemon=True)

    async def scenario(house: House) -> None:
        training.start()
        while not house.statuses(STEPS)["committed"]:  # transformers makes models with state that all threads share
            assert training.is_alive()
            await asyncio.sleep(0.05)
        async with living(*workers, validator):
            while training.is_alive():
                if may_score():
                    await house.score()
                await asyncio.sleep(0.05)

    site.house.run(scenario)
    training.join()
