"""What a teacher within the noise gets under a profile before it is found out, and how much it alters.

The profiles are those of the package, and one of bfloat16 that is calibrated here on a real model, SmolLM2.

A teacher sends, of the two best tokens, the one that the policy likes better wherever their scores are closer than its
reach, and its reward follows that alone: 1 for the half of its group whose text the policy likes best. No task rewards
a teacher more. Its rollouts are generated once and resampled into lives of a trusted node at the audit floor whose
submissions are two groups of eight, all of them in batches that are trained, so that the tripwire replays each: that
which the coordinator does (`farflung.trust.record`), in its order. Altered tokens are those of rollouts that no verdict
took before they were trained.

Prints one JSON object as its last line. Needs models/smollm2-135m (scripts/get_smollm2.py), else its rows are left out.
`--quick` takes a quarter of the rollouts and of the lives; the full command is `python bench/steering.py`.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from verification import SMOL, TOY, calibrated, requests, say

from farflung.engine.base import Completion, Request
from farflung.engine.local import LocalEngine
from farflung.envs.sums import Sums
from farflung.ops.calibrate import engine_of
from farflung.ops.redteam.texts import Teacher
from farflung.rollouts.tripwire import tripped
from farflung.tasks.found import Model
from farflung.trust import evidence, watch
from farflung.trust.evidence import Profile, Seen
from farflung.trust.policy import audit_probability
from farflung.trust.profiles import load_profile, names
from farflung.trust.record import Finding, NodeRecord, TrustSettings, confirm, fold, look_over, submitted, weigh
from farflung.trust.watch import Look

REACHES = (0.0, 0.005, 0.02, 0.1, 0.3, 1.0)
SAMPLES, GROUPS_AT_ONCE, MOST = 8, 2, 400
BUDGET = 24
SETTINGS = TrustSettings()
WORDS = ("gravity", "a cell", "rain", "love", "Paris", "jazz", "salt", "a verb", "steel", "an atom", "history", "luck")


class Rollout(NamedTuple):
    """One that was sent: what its audit would find, and what its look found.

    Both sides compute in float32 on one machine, so that each flip is a token that the teacher altered.
    """

    finding: Finding
    look: Look


def prompts_of(model: Model, path: str) -> list[tuple[int, ...]]:
    """Questions of a kind that the model answers undecidedly."""
    if path == str(SMOL):
        return [tuple(model.prompt_ids(f"Explain in a few words what {word} is.")) for word in WORDS]
    env = Sums()
    return [tuple(model.prompt_ids(env.prompt(task))) for task in itertools.islice(env.tasks("train"), 64)]


def own_profile(model: Model, verifier: LocalEngine, prompts: Sequence[tuple[int, ...]], part: float) -> Profile:
    """Of bfloat16 against float32, from honest rollouts."""
    asked = requests(np.random.default_rng(2), prompts, int(256 * part), 1.0, BUDGET)
    return calibrated("SmolLM2 in bfloat16", engine_of(model, "bfloat16", 1), verifier, asked)[0]


def sent(engine: LocalEngine, asked: Sequence[Request], reach: float) -> list[Completion]:
    """What a teacher says; an honest node if it reaches for nothing."""
    teacher = Teacher(reach)
    teacher.truth = engine
    done = teacher.generate(asked, None) if reach else engine.generate(asked)
    return [one for one in done if one is not None]


def groups_of(engine: LocalEngine, prompts: Sequence[tuple[int, ...]], count: int, reach: float, profile: Profile):
    """Groups of samples as the verifier sees them, and the tokens and bits of choice among them."""
    rng = np.random.default_rng(int(1000 * reach))
    asked = [
        Request(prompts[i % len(prompts)], int(rng.integers(2**63)), 1.0, BUDGET)
        for i in range(count)
        for _ in range(SAMPLES)
    ]
    done = sent(engine, asked, reach)
    replays = engine.replay([(request, one.ids) for request, one in zip(asked, done, strict=True)])
    seen = [Seen(one.gap, one.margin, one.pick, one.lead) for one in replays]
    likes = [float(one.logp.mean()) for one in replays]
    groups: list[list[Rollout]] = []
    for start in range(0, len(asked), SAMPLES):
        part = range(start, start + SAMPLES)
        middle = statistics.median(likes[i] for i in part)
        groups.append([rollout(profile, seen[i], float(likes[i] > middle)) for i in part])
    tokens = sum(len(one.gap) for one in seen)
    return groups, tokens, sum(watch.bits(profile, one) for one in seen) / tokens


def rollout(profile: Profile, seen: Seen, reward: float) -> Rollout:
    ratios = tuple(evidence.log_ratios(profile, seen).tolist())
    flips, allowed = watch.flips_and_allowed(profile, seen)
    return Rollout(Finding("r", len(seen.gap), flips, ratios), Look(flips, allowed, reward))


def life(groups: Sequence[Sequence[Rollout]], rng: np.random.Generator) -> tuple[int | None, int, int]:
    """(submissions until it is ejected, if it is; altered tokens that were trained; all tokens that were)."""
    record = NodeRecord("trusted", audited_submissions=40, audited_rollouts=500, clean_rollouts=500)
    altered = tokens = 0
    for number in range(1, MOST + 1):
        mine = [groups[i] for i in rng.integers(0, len(groups), GROUPS_AT_ONCE)]
        flat, record, is_kept = [one for group in mine for one in group], submitted(record), True
        p = audit_probability(record, SETTINGS)
        drawn = [one.finding for one in flat if rng.random() < p]
        if drawn:
            record, outcome = fold(record, drawn, SETTINGS, was_trusted=p < 1)
            if outcome.kind == "quarantine":
                record, outcome = confirm(record, drawn, SETTINGS, was_trusted=p < 1)
                if outcome.kind == "eject":
                    return number, altered, tokens
            is_kept = outcome.kind == "ok"
        if is_kept and tripped(("s", np.array(one.finding.log_ratios)) for one in flat):
            record, outcome = weigh(record, [one.finding for one in flat], SETTINGS)
            is_kept = outcome.kind == "ok"
        if is_kept:
            record, outcome = look_over(record, [[one.look for one in group] for group in mine], SETTINGS)
            if outcome.kind == "eject":
                return number, altered, tokens
            is_kept = outcome.kind == "ok"
        altered += sum(one.look.flips for one in flat) if is_kept else 0
        tokens += sum(one.finding.tokens for one in flat) if is_kept else 0
    return None, altered, tokens


def row(engine: LocalEngine, prompts: Sequence[tuple[int, ...]], reach: float, profile: Profile, part: float):
    """One reach under one profile."""
    groups, tokens, bits = groups_of(engine, prompts, int(48 * part), reach, profile)
    rng = np.random.default_rng(1)
    ends = [life(groups, rng) for _ in range(int(200 * part))]
    ejected = [end[0] for end in ends if end[0] is not None]
    looks = [one.look for group in groups for one in group]
    found = {
        "profile": profile.name, "reach": reach, "bits_per_token": round(bits, 4), "tokens": tokens,
        "altered": round(sum(look.flips for look in looks) / tokens, 5),
        "allowed": round(sum(look.allowed for look in looks) / tokens, 5),
        "ejected": round(len(ejected) / len(ends), 3),
        "submissions_until_ejected": statistics.median(ejected) if ejected else None,
        "altered_tokens_trained": statistics.median(end[1] for end in ends),
        "tokens_trained": statistics.median(end[2] for end in ends),
    }  # fmt: skip
    say(str(found))
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    part = 0.25 if parser.parse_args().quick else 1.0
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for path in (path for path in (TOY, SMOL) if path.exists()):
        model = Model(str(path))
        engine, prompts = engine_of(model, "float32", 1), prompts_of(model, str(path))
        profiles = [own_profile(model, engine, prompts, part)] if path == SMOL else map(load_profile, names())
        rows += [row(engine, prompts, reach, profile, part) for profile in profiles for reach in REACHES]
    sys.stdout.write(json.dumps({"lives_of_submissions": MOST, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
