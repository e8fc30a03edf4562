"""How many honest nodes a profile ejects: a thousand lives at three temperatures each, with up to six times its noise.

SmolLM2 generates in bfloat16 and is replayed in float32, once for each temperature; half of the rollouts calibrate a
profile, the other half is resampled into lives of 200 submissions of 16 rollouts, every one audited, which is more than
any node ever is. Noise beyond the recorded is that of the recorded log-probabilities, drawn anew at every position and
multiplied. Prints one JSON object as its last line. Needs models/smollm2-135m (scripts/get_smollm2.py); `--quick` takes
a quarter of the rollouts and a tenth of the lives; the full command is `python bench/lives.py`.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from farflung.engine.base import Request
from farflung.engine.local import LocalEngine
from farflung.ops.calibrate import TOLERANCE, engine_of
from farflung.protocol.numerics import Numerics
from farflung.tasks.create_run import Model
from farflung.trust import bounds, evidence
from farflung.trust.evidence import Profile, Seen
from farflung.trust.record import TrustSettings

SMOL = Path(__file__).parents[1] / "models" / "smollm2-135m"
WORDS = ("gravity", "a cell", "rain", "love", "Paris", "jazz", "salt", "a verb", "steel", "an atom", "history", "luck")
TEMPERATURES, FACTORS = (1.0, 0.7, 0.3), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BUDGET, SIZE, SUBMISSIONS, DRAWS = 24, 16, 200, 8
SETTINGS = TrustSettings()
BF16 = Numerics(engine="torch", device="cpu", arithmetic="bfloat16", bits=16)


def say(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%X')} {text}\n")


def record(
    generator: LocalEngine, verifier: LocalEngine, prompts: Sequence[tuple[int, ...]], t: float, count: int
) -> tuple[list[Seen], list[np.ndarray]]:
    """What the verifier sees of honest rollouts, and by how much both sides' log-probabilities differ."""
    rng = np.random.default_rng(int(100 * t))
    asked = [Request(prompts[i % len(prompts)], int(rng.integers(2**63)), t, BUDGET) for i in range(count)]
    done = generator.generate(asked)
    found = verifier.replay([(request, one.ids) for request, one in zip(asked, done, strict=True)])
    seen = [Seen(one.gap, one.margin, one.pick, one.lead) for one in found]
    return seen, [np.array(one.logp) - again.logp for one, again in zip(done, found, strict=True)]


def noisier(rng: np.random.Generator, seen: Seen, noise: np.ndarray, factor: float) -> Seen:
    """The same positions with other rounding: that of two tokens, so many times as large."""
    one, other = rng.choice(noise, (2, len(seen.gap)))
    off = factor * (one - other)
    return seen._replace(margin=np.where(off > seen.gap, np.maximum(seen.gap, 2 * evidence.TIE), 0.0))


def pool_of(profile: Profile, rollouts: Sequence[Seen]) -> np.ndarray:
    """ln LR of each rollout against every alternative, mixed as `evidence.submission_log_ratios` does."""
    each = [evidence.submission_log_ratios([evidence.log_ratios(profile, one)]) for one in rollouts]
    return np.stack(each)


def lives(pool: np.ndarray, rng: np.random.Generator, count: int) -> dict[str, Any]:
    """Keys whose every submission is audited in full; both processes see the same, so M is the mean of one."""
    m, highest, voided, sums = np.zeros((count, pool.shape[1])), np.zeros(count), 0, 0.0
    for k in range(SUBMISSIONS):
        total = pool[rng.integers(0, len(pool), (count, SIZE))].sum(axis=1)
        e = evidence.e_values(total, SETTINGS.cap, SETTINGS.arbitrary_share)
        m, _ = evidence.fold(m, k, e)
        highest = np.maximum(highest, m.mean(axis=1))
        voided += int((total.max(axis=1) >= np.log(SETTINGS.cap)).sum())
        sums = sums + np.minimum(np.exp(total), SETTINGS.cap).mean(axis=0)
    limit = SETTINGS.limit
    return {
        "ejected": int((highest >= limit).sum()),
        "voided_of_1000": round(1000 * voided / count / SUBMISSIONS, 3),
        "highest_log10_m": round(float(np.log10(highest.max())), 2),
        "largest_mean_ratio": round(float((sums / SUBMISSIONS).max()), 3),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    is_quick = parser.parse_args().quick
    if not SMOL.exists():
        sys.stdout.write(json.dumps({"skipped": f"{SMOL} is missing: python scripts/get_smollm2.py"}) + "\n")
        return
    torch.set_num_threads(2)
    model, rng = Model(str(SMOL)), np.random.default_rng(1)
    prompts = [tuple(model.prompt_ids(f"Explain in a few words what {word} is.")) for word in WORDS]
    generator, verifier = engine_of(model, "bfloat16", 2), engine_of(model, "float32", 2)
    rows: list[dict[str, Any]] = []
    for t in TEMPERATURES:
        seen, noise = record(generator, verifier, prompts, t, 48 if is_quick else 192)
        known, judged, of_all = seen[::2], seen[1::2], np.concatenate(noise)
        about = {"tolerance": TOLERANCE["bfloat16"] / t, "numerics": BF16, "verified_in": ["float32"]}
        profile = bounds.calibrate("torch-cpu-bf16", known, noise=of_all, **about)
        flipped = sum(map(evidence.flips, seen)) / sum(len(one.gap) for one in seen)
        say(f"temperature={t} tokens={len(of_all)} flipped={flipped:.4f} noise={profile.noise:.4f}")
        for factor in ("recorded", *FACTORS):
            played = judged if isinstance(factor, str) else [
                noisier(rng, one, of_all, factor) for _ in range(DRAWS) for one in judged
            ]  # fmt: skip
            found = lives(pool_of(profile, played), rng, 100 if is_quick else 1000)
            rows.append(
                {"temperature": t, "noise": factor, "flipped": round(flipped, 4), "far": round(profile.far, 2)} | found
            )
            say(str(rows[-1]))
    worst = max((row["noise"] for row in rows if not row["ejected"] and not isinstance(row["noise"], str)), default=0)
    sys.stdout.write(
        json.dumps({"quick": is_quick, "lives": rows, "margin": bounds.MARGIN, "unharmed_up_to": worst}) + "\n"
    )


if __name__ == "__main__":
    main()
