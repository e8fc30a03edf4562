"""Runs inside an environment that has toploc: proofs and verification of given activations, one JSON object as output.

    python bench/toploc_child.py STATES.npz

STATES holds pairs of arrays `NAME|sent`, `NAME|seen`, float32 (rollouts, positions, hidden size).
`bench/fingerprints.py` calls this; nothing of the package is imported.
"""

import json
import sys
import time

import numpy as np
import toploc
import torch
from toploc import ProofPoly, build_proofs_bytes, verify_proofs_bytes

TOKENS, TOP_K = 16, 128
"""A proof over all 16 positions; 128 points as published for every 32 tokens."""
BOUNDS = {"published": (90, 10.0, 8.0), "loosest seen": (60, 40.0, 40.0)}
"""Most exponent mismatches of 128, most mean and median error of the mantissa. Published: TOPLOC (Ong et al. 2025), for
128 points over 32 tokens; the others are the loosest seen in the training system that it was made for."""
CONSTANTS = range(0x3F00, 0x4300, 8)
"""bfloat16 patterns from 0.5 to 128 that a forger might repeat in every point."""


def forged(bits: int) -> bytes:
    """A proof that is the same value everywhere: a polynomial of degree 0."""
    return ProofPoly([bits, *[0] * (TOP_K - 1)], 65497).to_bytes()


def rows_of(states: np.ndarray) -> list[list[torch.Tensor]]:
    """Activations of every rollout as toploc takes them: a tensor per position."""
    return [list(torch.from_numpy(one).bfloat16()) for one in states]


def errors(proofs: list[list[bytes]], seen: list[list[torch.Tensor]]) -> np.ndarray:
    """(rollouts, 3): exponent mismatches, mean and median error of the mantissa."""
    found: list[tuple[float, float, float]] = []
    for proof, rows in zip(proofs, seen, strict=True):
        (one,) = verify_proofs_bytes(
            torch.stack(rows), proof, decode_batching_size=TOKENS, topk=TOP_K, skip_prefill=True
        )
        found.append((one.exp_mismatches, min(one.mant_err_mean, 1e6), min(one.mant_err_median, 1e6)))
    return np.array(found)


def passing(found: np.ndarray, bound: tuple[float, float, float]) -> np.ndarray:
    return (found <= np.array(bound)).all(axis=1)


def main() -> None:
    """Compare."""
    states = np.load(sys.argv[1])
    names = sorted({name.partition("|")[0] for name in states.files})
    report: dict[str, object] = {"version": toploc.__version__, "passing": {}, "worst": {}}
    build_s = verify_s = count = 0.0
    for name in names:
        sent, seen = rows_of(states[f"{name}|sent"]), rows_of(states[f"{name}|seen"])
        before = time.process_time()
        proofs = [build_proofs_bytes(rows, TOKENS, TOP_K, skip_prefill=True) for rows in sent]
        middle = time.process_time()
        found = errors(proofs, seen)
        build_s, verify_s = build_s + middle - before, verify_s + time.process_time() - middle
        count += len(sent)
        report["passing"][name] = {k: float(passing(found, b).mean()) for k, b in BOUNDS.items()}
        report["worst"][name] = np.quantile(found, [0.5, 1.0], axis=0).round(2).tolist()
    seen = rows_of(states[f"{names[0]}|seen"])
    constants = {bits: errors([[forged(bits)]] * len(seen), seen) for bits in CONSTANTS}
    report["best_constant_passes"] = {
        k: max(float(passing(found, b).mean()) for found in constants.values()) for k, b in BOUNDS.items()
    }
    report |= {"bytes": len(proofs[0][0]), "build_ms": 1e3 * build_s / count, "verify_ms": 1e3 * verify_s / count}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
