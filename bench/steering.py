"""What a teacher within the noise gets under a profile before it is found out, and how much it alters.

The profiles are those of the package, and one of bfloat16 that is calibrated here on a real model, SmolLM2.

A teacher sends, of the two best tokens, the one that the policy likes better wherever their scores are closer than its
reach, and its reward follows that alone: 1 for the half of its group whose text the policy likes best. No task rewards
a teacher more. One that hides turns as many near-ties the other way as its profile takes for honest. Their rollouts are
generated once and resampled into lives of a trusted node at the audit floor whose submissions are two groups of eight,
all of them in batches that are trained, so that the tripwire replays each: that which the coordinator does
(`farflung.trust.record`), in its order. Altered tokens are those of rollouts that no verdict took before they were
trained.

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

from farflung.audits.tripwire import tripped
from farflung.engine.base import Completion, Request
from farflung.engine.local import LocalEngine
from farflung.envs.sums import Sums
from farflung.ops.calibrate import engine_of
from farflung.redteam.picks import Teacher
from farflung.tasks.create_run import Model
from farflung.trust import evidence, watch
from farflung.trust.audit_policy import audit_probability
from farflung.trust.evidence import Profile, Seen
from farflung.trust.profiles import load_profile, names
from farflung.trust.record import Finding, NodeRecord, TrustSettings, confirm, fold, submitted, watch_groups, weigh
from farflung.trust.watch import WatchedRollout

REACHES = (0.0, 0.005, 0.02, 0.1, 0.3, 1.0)
HIDING = (0.1, 0.3)
SAMPLES, GROUPS_AT_ONCE, MOST = 8, 2, 400
BUDGET = 24
SETTINGS = TrustSettings()
WORDS = ("gravity", "a cell", "rain", "love", "Paris", "jazz", "salt", "a verb", "steel", "an atom", "history", "luck")


class Rollout(NamedTuple):
    """One that was sent: what its audit would find, and what its look found.

    Both sides compute in float32 on one machine, so that each flip is a token that the teacher altered.
    """

    finding: Finding
    look: WatchedRollout


class Hiding(Teacher):
    """Turns near-ties to the token that the policy likes less as well, as often as the honest at most."""

    def __init__(self, reach: float, liked: float) -> None:
        super().__init__(reach)
        self.odds = (1 - liked) / liked

    def pick(self, logits_BV: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        best = scores_BV.topk(2, dim=-1)
        likes_BK = logits_BV.gather(-1, best.indices)
        is_worse_B = (best.values[:, 0] - best.values[:, 1] < self.reach) & (likes_BK[:, 1] <= likes_BK[:, 0])
        is_hiding_B = is_worse_B & (torch.rand(len(is_worse_B)) < self.odds)
        return torch.where(is_hiding_B, best.indices[:, 1], super().pick(logits_BV, scores_BV))


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


def sent(engine: LocalEngine, asked: Sequence[Request], teacher: Teacher) -> list[Completion]:
    """What a teacher says; an honest node if it reaches for nothing."""
    teacher.truth = engine
    done = teacher.generate(asked, None) if teacher.reach else engine.generate(asked)
    return [one for one in done if one is not None]


def groups_of(engine: LocalEngine, prompts: Sequence[tuple[int, ...]], count: int, teacher: Teacher, profile: Profile):
    """Groups of samples as the verifier sees them, and of their tokens the number, bits of choice and mean logp."""
    rng = np.random.default_rng(7)
    asked = [
        Request(prompts[i % len(prompts)], int(rng.integers(2**63)), 1.0, BUDGET)
        for i in range(count)
        for _ in range(SAMPLES)
    ]
    done = sent(engine, asked, teacher)
    replays = engine.replay([(request, one.ids) for request, one in zip(asked, done, strict=True)])
    seen = [Seen(one.gap, one.margin, one.pick, one.lead) for one in replays]
    likes = [float(one.logp.mean()) for one in replays]
    groups: list[list[Rollout]] = []
    for start in range(0, len(asked), SAMPLES):
        part = range(start, start + SAMPLES)
        middle = statistics.median(likes[i] for i in part)
        groups.append([rollout(profile, seen[i], float(likes[i] > middle)) for i in part])
    tokens, liking = sum(len(one.gap) for one in seen), sum(float(one.logp.sum()) for one in replays)
    return groups, tokens, sum(watch.bits(profile, one) for one in seen) / tokens, liking / tokens


def rollout(profile: Profile, seen: Seen, reward: float) -> Rollout:
    ratios = tuple(evidence.log_ratios(profile, seen).tolist())
    counted = watch.count_flips(profile, seen)
    return Rollout(Finding("r", len(seen.gap), counted.flips, ratios), WatchedRollout(*counted, reward, profile.liked))


def life(groups: Sequence[Sequence[Rollout]], rng: np.random.Generator) -> tuple[int | None, int, int]:
    """(submissions until it is ejected, if it is; altered tokens that were trained; all tokens that were)."""
    record = NodeRecord("trusted", audited_submissions=40, audited_rollouts=500, clean_rollouts=500)
    altered = tokens = 0
    for number in range(1, MOST + 1):
        mine = [groups[i] for i in rng.integers(0, len(groups), GROUPS_AT_ONCE)]
        flat, record, is_kept = (
            [one for group in mine for one in group],
            submitted(record, sum(one.finding.tokens for group in mine for one in group)),
            True,
        )
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
            record, outcome = watch_groups(record, [[one.look for one in group] for group in mine], SETTINGS)
            if outcome.kind == "eject":
                return number, altered, tokens
            is_kept = outcome.kind == "ok"
        altered += sum(one.look.flips for one in flat) if is_kept else 0
        tokens += sum(one.finding.tokens for one in flat) if is_kept else 0
    return None, altered, tokens


def row(engine: LocalEngine, prompts: Sequence[tuple[int, ...]], teacher: Teacher, profile: Profile, part: float):
    """One teacher under one profile."""
    groups, tokens, bits, liking = groups_of(engine, prompts, int(48 * part), teacher, profile)
    rng = np.random.default_rng(1)
    ends = [life(groups, rng) for _ in range(int(200 * part))]
    ejected = [end[0] for end in ends if end[0] is not None]
    looks = [one.look for group in groups for one in group]
    found = {
        "profile": profile.name, "teacher": type(teacher).__name__, "reach": teacher.reach,
        "bits_per_token": round(bits, 4), "tokens": tokens, "logp_per_token": round(liking, 4),
        "altered": round(sum(look.flips for look in looks) / tokens, 5),
        "liked": round(sum(look.liked for look in looks) / max(1, sum(look.flips for look in looks)), 3),
        "likely": round(profile.liked, 3),
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
        for profile in profiles:
            teachers = [Teacher(reach) for reach in REACHES] + [Hiding(reach, profile.liked) for reach in HIDING]
            rows += [row(engine, prompts, teacher, profile, part) for teacher in teachers]
    sys.stdout.write(json.dumps({"lives_of_submissions": MOST, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
