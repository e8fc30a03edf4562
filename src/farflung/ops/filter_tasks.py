"""`farflung filter-tasks`: sample the base model on every training task, and keep those it sometimes gets right.

A group that is all right or all wrong has no gradient; tasks of which the base model gives only such groups cost
generation and teach nothing at first (INTELLECT-2 filters so before training).
"""

import hashlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from farflung.config import Config
from farflung.engine.base import Completion, Request
from farflung.engine.fit import UNKNOWN, Text, slots_on
from farflung.engine.local import LocalEngine
from farflung.envs.child import Prompt, ScorerChild
from farflung.learner.difficulty import RIGHT
from farflung.numerics.devices import pick
from farflung.protocol.errors import ConfigError, ScoreFault
from farflung.protocol.seeds import encode, sample_seed
from farflung.rollouts.archive import text_of
from farflung.tasks import task_filter
from farflung.tasks.create_run import Model, with_length
from farflung.tasks.stop_table import stops_of
from farflung.trust.profiles import load_profiles

log = logging.getLogger(__name__)
PROGRESS_S = 10.0
Task = tuple[Any, Prompt]


@dataclass(frozen=True)
class Band:
    """The tries of each task, and the pass rates that are kept."""

    samples: int
    low: float
    high: float


async def filter_tasks(config: Config, out: Path, band: Band) -> tuple[list[task_filter.FilteredTask], int]:
    """Write the tasks within the band; gives them and how many were tried. Raises ConfigError if none is left."""
    if not 0 <= band.low <= band.high <= 1 or band.samples < 1:
        raise ConfigError(f"a band goes from 0 to 1 and needs samples; got {band.low} to {band.high}, {band.samples}")
    model = Model(config.model.path)
    engine = _engine(config, model)
    async with ScorerChild(config.env.name, config.env.args, **_options(config)) as child:
        tasks = await child.tasks("train", config.env.train_tasks)
        found = [one async for one in _measure(config, model, engine, child, tasks, band.samples)]
    chosen = task_filter.within(found, band.low, band.high)
    if not chosen:
        raise ConfigError(f"none of {len(tasks)} tasks has a pass rate of {band.low} to {band.high}; widen the band")
    task_filter.write(out, chosen)
    return chosen, len(tasks)


def _options(config: Config) -> dict[str, str]:
    return {"python": config.env.python} if config.env.python else {}


def _engine(config: Config, model: Model) -> LocalEngine:
    """The base model as a worker would have it: published in bfloat16, computed in the run's arithmetic."""
    from farflung.learner.policy import Policy

    path, worker = config.model.path, config.worker
    dtype, device = getattr(torch, load_profiles(config.model).dtype), pick(worker.device)
    text = Text(UNKNOWN.prompt, config.generate.max_new_tokens)
    engine = LocalEngine.from_folder(
        path,
        dtype=dtype,
        threads=worker.threads,
        device=device,
        eos_ids=model.eos_ids,
        stops=stops_of(model, config.generate.stop),
        max_rows=slots_on(device, path, dtype, text, worker.slots, memory_gb=worker.memory_gb),
    )
    engine.load(Policy.from_pretrained(path).tensors())
    return engine


async def _measure(
    config: Config, model: Model, engine: LocalEngine, child: ScorerChild, tasks: Sequence[Task], samples: int
) -> AsyncIterator[task_filter.FilteredTask]:
    """One count per task that could be scored, in order."""
    begun = said = time.monotonic()
    at_once = max(1, 4 * engine.max_rows // samples)
    for start in range(0, len(tasks), at_once):
        some = tasks[start : start + at_once]
        done = engine.generate([one for task in some for one in _requests(config, model, task, samples)])
        for number, task in enumerate(some):
            count = await _count(config, model, child, task, done[number * samples : (number + 1) * samples])
            if count is not None:
                yield count
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            log.info("tried tasks=%d/%d after_s=%.0f", start + len(some), len(tasks), said - begun)


def _requests(config: Config, model: Model, task: Task, samples: int) -> Iterator[Request]:
    """The samples of one task; their seeds follow from the run's, so the same command gives the same file."""
    secret = hashlib.sha256(encode("farflung filter-tasks", config.run.seed)).digest()
    prompt, _ = with_length(config, task[0], task[1])
    ids = tuple(model.prompt_ids(prompt))
    for index in range(samples):
        seed = sample_seed(secret, task_filter.identity(task[0]), index)
        yield Request(ids, seed, config.generate.temperature, config.generate.max_new_tokens)


async def _count(
    config: Config, model: Model, child: ScorerChild, task: Task, done: Sequence[Completion | None]
) -> task_filter.FilteredTask | None:
    """How often one task was answered rightly; None if none of its answers can be scored."""
    rewards: list[float] = []
    answers = [one for one in done if one is not None]
    for one in answers:
        try:
            text = text_of(model.tokenizer, one.ids, config.generate.stop)
            rewards.append((await child.score(task[0], text)).reward)
        except ScoreFault as fault:
            log.warning("a sample cannot be scored because=%s", fault)
    if not rewards:
        return None
    shown = task[1] if isinstance(task[1], str) else task[1][-1]["content"]
    tokens = sum(len(one.ids) for one in answers) * len(rewards) // len(answers)
    return task_filter.FilteredTask(
        task_filter.identity(task[0]), len(rewards), sum(r >= RIGHT for r in rewards), tokens, shown[:200]
    )
