"""`report.html`: the outcome of a run in one file without scripts, to be mailed, archived and opened anywhere."""

import json
from pathlib import Path
from typing import Any

from farflung.dashboard.formats import HERE, clean, curves, environment
from farflung.launch.examples import five_answers
from farflung.launch.view import desk_of, run_in

FIGURES = (
    ("held-out score before", "eval_before", "share"),
    ("held-out score after", "eval_after", "share"),
    ("held-out pass@k before", "pass_k_before", "share"),
    ("held-out pass@k after", "pass_k_after", "share"),
    ("training reward, first steps", "reward_first", "share"),
    ("training reward, last steps", "reward_last", "share"),
    ("steps", "steps", "count"),
    ("wall time", "wall_s", "seconds"),
    ("first accepted rollout after", "first_reward_s", "seconds"),
    ("rollouts accepted", "rollouts_accepted", "count"),
    ("rollouts rejected", "rollouts_rejected", "count"),
    ("tokens generated", "tokens_generated", "count"),
    ("tokens verified", "tokens_verified", "count"),
    ("tokens trained on", "tokens_trained", "count"),
    ("audits", "audits", "count"),
    ("share of rollouts audited", "audited_fraction", "percent"),
    ("verification, of generation", "verification_overhead", "percent"),
    ("verification once all had trust", "verification_overhead_steady", "percent"),
    ("workers seen", "nodes_seen", "count"),
    ("honest nodes ejected", "honest_ejected", "count"),
    ("leases re-issued", "leases_reissued", "count"),
    ("staleness, mean steps", "staleness_mean", "fixed"),
    ("mismatch KL, mean", "mismatch_kl_mean", "fixed"),
    ("trainer idle", "trainer_idle_fraction", "percent"),
    ("weights sent per step", "weights_sent_bytes_per_step", "bytes"),
    ("pause of a worker to load weights", "sync_pause_s", "seconds"),
    ("cost at the configured prices", "cost_usd", "usd"),
    ("per million verified tokens", "usd_per_million_verified_tokens", "usd"),
)
"""Label, name in summary.json, and how it is shown."""


async def write_report(folder: Path, summary: dict[str, Any]) -> Path:
    """Write report.html beside summary.json; gives its path."""
    config = run_in(folder)
    desk = desk_of(config)
    try:
        snapshot = await desk.snapshot()
        answers = await five_answers(folder)
    finally:
        desk.database.close()
    template = environment(is_live=False).get_template("report.html")
    text = template.render(
        s=snapshot,
        summary=summary,
        figures=FIGURES,
        points=curves(snapshot.steps, snapshot.evals),
        answers=answers,
        style=(HERE / "static" / "style.css").read_text(),
        config=clean(json.dumps(_settings(config.model_dump(mode="json")), indent=2)),
        verdicts={node["node"]: node for node in summary["nodes_ejected"]},
    )
    path = folder / "report.html"
    path.write_text(text)
    return path


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is not for everybody: addresses, invites, keys."""
    return {name: section for name, section in tree.items() if name != "coordinator"}
