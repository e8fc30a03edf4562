"""The gallery of adversaries: each a real worker that changes one thing. For runs of one's own only."""

from collections.abc import Callable

from farflung.ops.redteam import senders, texts
from farflung.ops.redteam.base import Attack

GALLERY: dict[str, Callable[[], Attack]] = {
    "unseeded": texts.Unseeded,
    "best-of-2-likeliest": lambda: texts.BestOf(2, texts.likely),
    "best-of-4-likeliest": lambda: texts.BestOf(4, texts.likely),
    "best-of-4-longest": lambda: texts.BestOf(4, texts.long),
    "best-of-4-shortest": lambda: texts.BestOf(4, texts.short),
    "reroll": texts.Reroll,
    "top-k": lambda: texts.TopK(4),
    "greedy": texts.Greedy,
    "int4": lambda: texts.Bits(4),
    "first-weights": texts.First,
    "pruned": texts.Pruned,
    "edited": texts.Edited,
    "sure-edit": texts.SureEdit,
    "cut-short": texts.CutShort,
    "endless": texts.Endless,
    "verbose": texts.Verbose,
    "other-prompt": texts.OtherPrompt,
    "copied": texts.Copied,
    "replayed": senders.Replayed,
    "other-lease": senders.OtherLease,
    "forged-evidence": senders.ForgedEvidence,
    "forged-logp": senders.ForgedLogp,
    "forged-fingerprint": senders.ForgedFingerprint,
    "constant-fingerprint": senders.ConstantFingerprint,
    "zero-fingerprint": senders.ZeroFingerprint,
    "missing-fingerprint": senders.MissingFingerprint,
    "forged-reward": lambda: senders.Raw(senders.with_reward),
    "nan": lambda: senders.Raw(senders.with_nan),
    "malformed": lambda: senders.Raw(senders.cut),
    "oversized": lambda: senders.Raw(senders.huge),
    "bomb": lambda: senders.Raw(senders.bomb, **{"content-encoding": "gzip"}),
    "temperature-0.9": lambda: texts.Temperature(0.9),
    "temperature-1.1": lambda: texts.Temperature(1.1),
    "int8": lambda: texts.Bits(8),
    "stale-1": lambda: texts.Stale(1),
    "stale-5": lambda: texts.Stale(5),
    "one-layer": texts.OneLayer,
    "sometimes": texts.Sometimes,
    "patient": texts.Patient,
    "patient-tenth": texts.PatientTenth,
    "easy-picking": senders.EasyPicking,
    "many-keys": senders.ManyKeys,
    "near-tie": lambda: texts.NearTie(0.02),
    "margin-budget": texts.MarginBudget,
}
"""Name → how to make the attack."""
