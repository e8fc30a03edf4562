"""Coordinator: try validators on rollouts whose truth is known, before their evidence of that step counts.

The trainer makes a few rollouts with each new version. A validator gets them as audits like any other: as they are, and
spoiled. A validator that finds fault with the first or none with the second has a broken verifier, and is named.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy import Connection, Row

from farflung.audits import self_test as selftest
from farflung.audits.audit import audit_nonce, profile_of, verify_in
from farflung.audits.possession import warn
from farflung.protocol import seeds, wire
from farflung.protocol.errors import Malformed, NotFound
from farflung.protocol.messages import AuditJob, AuditRollout, Canary, Evidence, Floats, Ids, SelfTest, SelfTestItem
from farflung.protocol.numerics import Dtype
from farflung.store.run import RunContext
from farflung.store.tables import CHECKS, STEPS, TASKS
from farflung.trust.evidence import TIE, Profile, Profiles, Seen, is_bad, log_ratios, mean_log_ratio, to_json

log = logging.getLogger(__name__)
TOKENS = 8
"""Most tokens of a canary."""
SPOILED_EVERY = 4
"""One token in so many is another one in a spoiled canary, the first among them."""
Arithmetics = tuple[Dtype, ...]
"""What an audit is to be replayed in, as `AuditJob.verify_in`."""


class Made(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The document stored where a step has a self-test too; else the canaries alone."""

    canaries: "list[StoredCanary]"
    self_test: "list[StoredCanary]"


class StoredCanary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A canary with what the new weights said to it."""

    canary: Canary
    ids: Ids
    logp: Floats = b""


def requests(connection: Connection, run_ctx: RunContext, step: int) -> list[Canary]:
    """The requests for the trainer to generate with the weights of a step: its canaries, then its self-test."""
    prompts = [_prompt_of(connection, task) for task in selftest.tasks(run_ctx, step)]
    return [*_canaries(connection, run_ctx, step), *selftest.requests(run_ctx, step, prompts)]


def _canaries(connection: Connection, run_ctx: RunContext, step: int) -> list[Canary]:
    key = seeds.canary_key(run_ctx.step_secret(step))
    max_new_tokens = min(TOKENS, run_ctx.config.generate.max_new_tokens)
    return [
        Canary(
            prompt_ids=_prompt(connection, run_ctx, key, i), seed=_number(key, "seed", i), max_new_tokens=max_new_tokens
        )
        for i in range(run_ctx.config.trust.canaries)
    ]


def _prompt(connection: Connection, run_ctx: RunContext, key: bytes, i: int) -> bytes:
    task = run_ctx.tasks[_number(key, "task", i) % len(run_ctx.tasks)][0]
    return _prompt_of(connection, task)


def _prompt_of(connection: Connection, task: str) -> bytes:
    return connection.execute(sa.select(TASKS.c.prompt_ids).where(TASKS.c.task == task)).scalar_one()


def _number(key: bytes, label: str, *parts: int) -> int:
    return seeds.number(seeds.derive(key, f"canary {label}", *parts))


def keep(
    connection: Connection, run_ctx: RunContext, step: int, answers: Sequence[bytes], logp: Sequence[bytes] = ()
) -> bytes | None:
    """The document stored of a step's canaries; none if the trainer made none. Raises Malformed."""
    if not answers:
        return None
    asked = requests(connection, run_ctx, step)
    sizes = [(len(ids), 4 * one.max_new_tokens) for one, ids in zip(asked, answers, strict=False)]
    if len(answers) != len(asked) or not all(0 < size <= most for size, most in sizes):
        raise Malformed(f"step {step} asks for {len(asked)} canaries within their budgets, not for {len(answers)}")
    if logp and [len(wire.unpack_floats(one)) for one in logp] != [len(ids) // 4 for ids in answers]:
        raise Malformed(f"step {step} has log-probabilities of other canaries than it generated")
    told = logp or [b""] * len(asked)
    kept = [StoredCanary(*one) for one in zip(asked, answers, told, strict=True)]
    split = run_ctx.config.trust.canaries
    return msgspec.msgpack.encode(Made(kept[:split], kept[split:]) if kept[split:] else kept)


def made(stored: bytes | None) -> Made:
    """The stored document of a step, decoded."""
    found = msgspec.msgpack.decode(stored, type=list[StoredCanary] | Made) if stored else []
    return found if isinstance(found, Made) else Made(found, [])


def self_test(connection: Connection, run_ctx: RunContext, profiles: Profiles, digest: str) -> SelfTest:
    """The self-test of a version. Raises NotFound."""
    query = sa.select(STEPS.c.step, STEPS.c.canaries).where(
        STEPS.c.run == run_ctx.run, STEPS.c.manifest_digest == digest
    )
    row = connection.execute(query).first()
    kept = made(row.canaries).self_test if row else []
    if row is None or not kept:
        raise NotFound(f"version {digest[:12]} has no self-test")
    return SelfTest(
        step=row.step,
        temperature=run_ctx.config.generate.temperature,
        profiles={one.name: to_json(one) for one in profiles.every},
        items=[
            SelfTestItem(
                prompt_ids=k.canary.prompt_ids,
                seed=k.canary.seed,
                max_new_tokens=k.canary.max_new_tokens,
                ids=k.ids,
                logp=k.logp,
            )
            for k in kept
        ],
    )


# --- trying a validator ----------------------------------------------------------------------------------------------


def jobs(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, validator: str, audits: Sequence[Row[Any]]
) -> list[AuditJob]:
    """Canaries that this validator has to answer before its evidence on these audits, all of one step, counts.

    They are to be replayed as each kind of audit among them is, so that no engine of the validator goes untried.
    """
    asked = {verify_in(profile_of(connection, profiles, audit.submission), audit.kind): audit.step for audit in audits}
    return [
        job
        for arithmetics, step in asked.items()
        if not has_passed(connection, run_ctx, validator, step, arithmetics)
        for job in _jobs(connection, run_ctx, profiles, validator, step, arithmetics)
    ]


def _jobs(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, validator: str, step: int, arithmetics: Arithmetics
) -> list[AuditJob]:
    manifest = run_ctx.manifest_of(connection, step)
    probe = seeds.probe_key(run_ctx.step_secret(step)).hex()
    return [
        AuditJob(
            audit=name,
            step=step,
            manifest=manifest,
            temperature=run_ctx.config.generate.temperature,
            max_new_tokens=kept.canary.max_new_tokens,
            nonce=audit_nonce(name),
            probe=probe,
            profile=to_json(_as_published(_judged_by(profiles, arithmetics))),
            verify_in=arithmetics,
            cap=0.0,
            rollouts=[
                AuditRollout(
                    rollout="r" + name[1:],
                    prompt_ids=kept.canary.prompt_ids,
                    seed=kept.canary.seed,
                    ids=spoiled(kept.ids, run_ctx.vocab, name) if is_spoiled else kept.ids,
                )
            ],
        )
        for name, kept, is_spoiled in _named(
            _canaries_of(connection, run_ctx, step), run_ctx, validator, step, arithmetics
        )
    ]


def _as_published(profile: Profile) -> Profile:
    """The same for the weights that the trainer answers a canary with."""
    return msgspec.structs.replace(profile, quantiser="")


def _judged_by(profiles: Profiles, arithmetics: Arithmetics) -> Profile:
    """The first profile whose audits are replayed in these arithmetics."""
    return next(one for one in profiles.every if set(one.verified_in) == set(arithmetics))


def spoiled(ids: bytes, vocab: int, name: str) -> bytes:
    """Tokens of which some are others, chosen by a name."""
    found = wire.unpack_ids(ids).tolist()
    for at in range(0, len(found), SPOILED_EVERY):
        shift = int.from_bytes(seeds.encode(name, at), "big") % (vocab - 1)
        found[at] = (found[at] + 1 + shift) % vocab
    return wire.pack_ids(found)


def has_passed(
    connection: Connection, run_ctx: RunContext, validator: str, step: int, arithmetics: Arithmetics
) -> bool:
    """Whether this validator judged all canaries of a step rightly, replayed so, or there are none."""
    kept = _canaries_of(connection, run_ctx, step)
    asked = {name for name, _, _ in _named(kept, run_ctx, validator, step, arithmetics)}
    return asked <= set(_checks(connection, run_ctx, validator, step, is_passed=True))


def has_failed(connection: Connection, run_ctx: RunContext, validator: str, since: float) -> bool:
    """Whether this validator judged a canary wrongly since a time: it gets no work for a while."""
    mine = sa.and_(
        CHECKS.c.run == run_ctx.run, CHECKS.c.validator == validator, ~CHECKS.c.is_passed, CHECKS.c.at > since
    )
    return connection.execute(sa.select(CHECKS.c.check).where(mine).limit(1)).first() is not None


def take(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, validator: str, evidence: Evidence, now: float
) -> int | None:
    """Take evidence on a canary; gives 1, or None if it is about no canary of this validator's."""
    query = sa.select(STEPS.c.step).where(STEPS.c.run == run_ctx.run, STEPS.c.manifest_digest == evidence.manifest)
    step = connection.execute(query).scalar()
    named = {} if step is None else _asked(connection, run_ctx, profiles, validator, step)
    if evidence.audit not in named:
        return None
    profile, is_spoiled = named[evidence.audit]
    fault = _fault(profile, evidence, is_spoiled=is_spoiled)
    connection.execute(CHECKS.delete().where(CHECKS.c.check == evidence.audit))
    row = {"check": evidence.audit, "run": run_ctx.run, "step": step, "validator": validator, "at": now}
    connection.execute(CHECKS.insert().values(row | {"is_passed": not fault}))
    if fault:
        why = f"validator {validator} failed a canary of step {step}: {fault}; its evidence on this step does not count"
        warn(connection, validator, why, now)
    return 1


def _asked(
    connection: Connection, run_ctx: RunContext, profiles: Profiles, validator: str, step: int
) -> dict[str, tuple[Profile, bool]]:
    """By its name as an audit, the profile that a canary of this validator's is judged by and whether it is spoiled."""
    kept, found = _canaries_of(connection, run_ctx, step), dict[str, tuple[Profile, bool]]()
    for arithmetics in {order for one in profiles.every for order in (one.verified_in, one.verified_in[::-1])}:
        profile = _judged_by(profiles, arithmetics)
        for name, _, is_spoiled in _named(kept, run_ctx, validator, step, arithmetics):
            found[name] = profile, is_spoiled
    return found


def _fault(profile: Profile, evidence: Evidence, *, is_spoiled: bool) -> str:
    """The validator's fault at one canary, or nothing."""
    (found,) = evidence.rollouts[:1]
    seen = Seen(*(wire.unpack_floats(getattr(found, name)) for name in Seen._fields))
    try:
        weight = mean_log_ratio(log_ratios(profile, seen))
    except ValueError as error:
        raise Malformed(f"evidence on rollout {found.rollout}: {error}") from error
    if is_spoiled:
        flips = (seen.margin[::SPOILED_EVERY] > TIE).sum()
        return "" if 2 * flips >= len(seen.margin[::SPOILED_EVERY]) else "it finds no fault with text that is none"
    return "it takes an honest rollout for a cheat's" if is_bad(weight, 1000.0) else ""


def _canaries_of(connection: Connection, run_ctx: RunContext, step: int) -> list[StoredCanary]:
    query = sa.select(STEPS.c.canaries).where(STEPS.c.run == run_ctx.run, STEPS.c.step == step)
    return made(connection.execute(query).scalar()).canaries


def _named(
    canaries: Sequence[StoredCanary], run_ctx: RunContext, validator: str, step: int, arithmetics: Arithmetics
) -> Iterator[tuple[str, StoredCanary, bool]]:
    """(name as an audit, canary, whether it is spoiled) of each canary as this validator gets it."""
    key = seeds.canary_key(run_ctx.step_secret(step))
    for i, kept in enumerate(canaries):
        for is_spoiled in (False, True):
            name = seeds.derive(key, "canary name", validator, i, int(is_spoiled), *arithmetics)[:6].hex()
            yield f"a{name}", kept, is_spoiled


def _checks(
    connection: Connection, run_ctx: RunContext, validator: str, step: int, *, is_passed: bool
) -> Sequence[str]:
    mine = sa.and_(CHECKS.c.run == run_ctx.run, CHECKS.c.step == step, CHECKS.c.validator == validator)
    query = sa.select(CHECKS.c.check).where(mine, CHECKS.c.is_passed == is_passed)
    return list(connection.execute(query).scalars())
