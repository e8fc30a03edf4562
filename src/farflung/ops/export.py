"""`farflung export`: a run's policy as a plain Hugging Face folder, with a card that says where it comes from.

The weights are those that were published and evaluated: the checkpoint's masters, rounded as the trainer rounds them,
and compared with the digest that the coordinator recorded for the step.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any

from farflung.config import Config, load_run
from farflung.learner.estimate import interval
from farflung.protocol.errors import ConfigError, WeightsError
from farflung.tasks.create_run import Model

FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files that go along from the base model, where it has them."""


def export(folder: Path, out: Path, step: int | None = None) -> int:
    """Write the policy of the newest checkpoint, or of a step's; gives the step. Raises ConfigError or WeightsError."""
    from safetensors.torch import save_file

    from farflung.learner import checkpoint
    from farflung.weights.publish import weights_digest

    config = load_run(folder)
    if out.exists():
        raise ConfigError(f"{out} exists already; remove it or name another folder")
    fitting = [one for one in checkpoint.complete(folder / "checkpoints") if step in (None, one.step)]
    if not fitting:
        raise ConfigError(f"{folder / 'checkpoints'} has no checkpoint of step {step}; leave --step out for the newest")
    chosen = fitting[-1]
    found = dict(checkpoint.published(chosen.path, is_dithered=config.learn.rounding == "dithered"))
    tensors = {name: found[name] for name in _names(chosen.path) if name in found}  # a digest depends on the order
    digest = weights_digest(tensors.items(), in_parts=not config.learn.is_adapters_alone)
    recorded = _recorded(folder, config, chosen.step)
    if recorded and digest != recorded:
        raise WeightsError(f"step {chosen.step} comes to {digest[:12]}, it was published as {recorded[:12]}")
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _copy_rest(config, chosen.path, out)
    (out / "README.md").write_text(card(config, _summary(folder), chosen.step, digest))
    return chosen.step


def card(config: Config, figures: dict[str, Any], step: int, digest: str) -> str:
    """The model card: base, data, steps, contributors, evaluations, cost."""
    base = Path(config.model.path).name if Path(config.model.path).is_dir() else config.model.path
    learn, env = config.learn, config.env
    rows = {
        "base model": base,
        "weights": f"bfloat16, digest `{digest}`",
        "steps": f"{step} of {config.run.steps}, {learn.groups} groups of {config.generate.samples} rollouts each",
        "data": f"`{env.name}` with `{json.dumps(env.args)}`, {env.train_tasks} training tasks at most",
        "learning": f"{learn.loss}, AdamW at {learn.lr:g}, staleness up to {learn.max_staleness} steps",
        "tokens trained": figures.get("tokens_trained"),
        "contributors": f"{figures.get('nodes_seen')} nodes; {len(figures.get('nodes_ejected') or [])} of them ejected",
        "verification": f"{figures.get('audits')} audits of {_share(figures.get('audited_fraction'))} of the rollouts",
        "held-out score before": _score(figures, "eval_before"),
        "held-out score after": _score(figures, "eval_after"),
        "cost": f"{figures.get('cost_usd')} USD at the configured prices, {figures.get('wall_s')} s",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    head = f"---\nbase_model: {base}\nlibrary_name: transformers\ntags: [farflung, grpo]\n---\n"
    about = "Trained with reinforcement learning by farflung, on rollouts of machines that did not have to be trusted."
    return "\n".join([f"{head}# {config.run.name}, step {step}", "", about, "", "| | |", "| --- | --- |", *lines, ""])


def _score(figures: dict[str, Any], name: str) -> str | None:
    score, tasks = figures.get(name), figures.get("eval_tasks") or 0
    if score is None:
        return None
    low, high = interval(score, tasks)
    return f"{score:.3f} greedily on {tasks} tasks (95 %: {low:.3f} to {high:.3f})"


def _share(value: float | None) -> str:
    return "some" if value is None else f"{value:.1%}"


def _names(checkpoint: Path) -> list[str]:
    """The names of a model's tensors in its own order."""
    import torch

    from farflung.engine.loading import build

    with torch.device("meta"):
        return list(build(checkpoint, torch.bfloat16).state_dict())


def _summary(folder: Path) -> dict[str, Any]:
    """summary.json, computed anew where the run left none."""
    from farflung.launch.summary import summarise

    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else summarise(folder)


def _recorded(folder: Path, config: Config, step: int) -> str:
    """The digest under which a step was committed; empty where the database is not a file beside the run."""
    path = folder / "farflung.db"
    if not path.exists():
        return ""
    query = "SELECT weights_digest FROM steps WHERE run = ? AND step = ?"
    with sqlite3.connect(path) as database:
        row = database.execute(query, (config.run.name, step)).fetchone()
    database.close()
    return row[0] if row and row[0] else ""


def _copy_rest(config: Config, checkpoint: Path, out: Path) -> None:
    fields = json.loads((checkpoint / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"}, indent=2) + "\n")
    model = Model(config.model.path)
    for name in FILES:
        if (data := model.file(name)) is not None:
            (out / name).write_bytes(data)
