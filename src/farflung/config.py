"""One frozen tree of settings: defaults < TOML file < environment < `--section.key value`.

Environment variables are FARFLUNG_SECTION__KEY. Every field says what it does; docs/config.md lists them all.
"""

import difflib
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from farflung.protocol.errors import ConfigError

Role = Literal["trainer", "validator", "scorer"]
PREFIX = "FARFLUNG_"
SAVED = "config.json"
MOST_STOPS, STOP_BYTES = 4, 32
"""The resolved configuration in a run's folder."""
OF_A_RUN = ("keys", "farflung.db", "checkpoints")
"""A folder with any of these beside its config.json is the folder of a run."""


class Section(BaseModel):
    """Base of every section."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def setting(default: Any, doc: str, **bounds: Any) -> Any:
    """A field with its default, its documentation and its bounds."""
    return Field(default=default, description=doc, **bounds)


class RunSection(Section):
    name: str = setting(
        "run", "Name of the run; its files are under `dir`/`name`.", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$"
    )
    dir: Path = setting(Path("runs"), "Folder of all runs, relative to where the command is given.")
    steps: int = setting(100, "Training steps, then the run ends.", ge=1)
    seed: int = setting(0, "Seed of task order and training.")
    reproducible: bool = setting(
        False,
        "Derive the secret from the seed. Tests and demos only: whoever knows the seed knows the noise.",
    )


class ModelSection(Section):
    path: str = setting("", "Folder of a Hugging Face causal LM, or its hub id.")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "Arithmetic of generation and replay.")
    profile: str = setting("torch-cpu-fp32", "Numerics profile of nodes that pick none: a name or a JSON file.")
    profiles: tuple[str, ...] = setting((), "Further profiles that nodes may pick; each is judged by its own.")


class EnvSection(Section):
    name: str = setting(
        "sums", "`sums`, `reasoning_gym:TASK`, `path/to/file.py:Class` or `path/to/questions.jsonl` (or .json, .csv)."
    )
    args: dict[str, Any] = setting({}, "Keyword arguments of the environment.")
    train_tasks: int = setting(4096, "Training tasks taken from the environment.", ge=1, le=1_000_000)
    eval_tasks: int = setting(512, "Held-out tasks taken from the environment.", ge=0, le=100_000)
    keep: str = setting("", "File of `farflung sift`: train on its tasks only; empty for all.")
    lengths: tuple[int, ...] = setting(
        (), "Lengths in tokens, one of which each prompt names, drawn from the task and `run.seed`; empty for none."
    )
    length_weight: float = setting(
        0.0003, "Taken from a training reward for each token that the length is off its target.", ge=0
    )
    length_prompt: str = setting(
        "{prompt}\nThink for about {tokens} tokens before you answer.", "How a prompt names its length."
    )
    python: str = setting("", "Interpreter for the environment, when it needs packages of its own; empty for this one.")

    @model_validator(mode="after")
    def _lengths_are_told(self) -> Self:
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths {self.lengths} are numbers of tokens, each at least 1")
        if self.lengths and not ("{prompt}" in self.length_prompt and "{tokens}" in self.length_prompt):
            raise ValueError(f"length_prompt {self.length_prompt!r} must hold {{prompt}} and {{tokens}}")
        return self


class GenerateSection(Section):
    samples: int = setting(16, "Samples per group (G).", ge=2, le=4096)
    temperature: float = setting(1.0, "Sampling temperature.", gt=0, le=10)
    budget: int = setting(256, "Most new tokens per rollout, the end token included.", ge=1, le=131_072)
    stop: tuple[str, ...] = setting(
        (), "Strings that end a rollout with the token that completes one; what is scored stands before it."
    )

    @field_validator("stop")
    @classmethod
    def _stop_is_short(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        sizes = [len(one.encode(errors="replace")) for one in stop]
        if len(stop) > MOST_STOPS or any(not 1 <= size <= STOP_BYTES for size in sizes):
            raise ValueError(f"{list(stop)!r}: at most {MOST_STOPS} strings of 1 to {STOP_BYTES} bytes")
        return stop


class LearnSection(Section):
    groups: int = setting(16, "Groups with variance in reward that make a step.", ge=1)
    oversample: float = setting(2.0, "A step also closes at this multiple of `groups` complete ones.", ge=1)
    max_staleness: int = setting(2, "Most steps between the policy that generated and the one trained.", ge=0)
    lockstep: bool = setting(
        False,
        "Step s trains on the groups of policy s - 1 - max_staleness, all and only those: same run, same weights.",
    )
    lr: float = setting(1e-6, "Learning rate of AdamW.", gt=0)
    warmup_steps: int = setting(0, "Optimizer steps of linear warm-up.", ge=0)
    minibatches: int = setting(1, "Optimizer steps per training step; micro-batches are made small enough.", ge=1)
    beta1: float = setting(0.9, "AdamW's decay of the gradient's mean.", ge=0, lt=1)
    beta2: float = setting(0.99, "AdamW's decay of the gradient's square.", ge=0, lt=1)
    loss: Literal["grpo", "cispo", "gspo"] = setting(
        "grpo", "Two-sided clip per token, clipped importance weights, or one ratio per rollout."
    )
    epsilon: float = setting(0.2, "Clip of the ratio below 1, and above where `epsilon_high` is 0.", gt=0, lt=1)
    epsilon_high: float = setting(0.0, "Clip of the ratio above 1; 0 for `epsilon`.", ge=0)
    delta: float = setting(4.0, "Upper bound of the ratio where the advantage is negative.", gt=1)
    normalise: Literal["token", "sequence", "constant"] = setting("token", "How token losses are averaged.")
    divide_by_std: bool = setting(True, "Divide advantages by the group's standard deviation.")
    kl: float = setting(0.0, "Weight of the KL to the base model, which is then held in memory too.", ge=0)
    entropy: float = setting(0.0, "Weight of the entropy that is rewarded.", ge=0)
    importance_cap: float = setting(
        2.0, "Most that a stale token counts by its importance weight; 0 to take stale tokens as they are.", ge=0
    )
    max_grad_norm: float = setting(1.0, "Gradient clipping.", gt=0)
    weight_decay: float = setting(0.0, "AdamW weight decay.", ge=0)
    microbatch_tokens: int = setting(8192, "Tokens per forward pass, padding included.", ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Arithmetic of training; masters are float32. `auto` is bfloat16 where the machine has it, else float32.",
    )
    rounding: Literal["dithered", "nearest"] = setting(
        "dithered",
        "How masters become the bfloat16 that is published: small updates show at once, or once they add up.",
    )
    lora_rank: int = setting(0, "Train adapters of this rank and nothing else; 0 for all weights.", ge=0, le=4096)
    lora_scale: float = setting(2.0, "What an adapter's product is multiplied by.", gt=0)
    lora_publish: Literal["adapters", "merged"] = setting(
        "adapters",
        "What travels of a step with `lora_rank`: adapters, which nodes merge into the base (`dithered`, whatever "
        "`rounding` is), or the difference of merged weights.",
    )
    checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    checkpoint_every: int = setting(1, "Steps between checkpoints; those between are replayed after a crash.", ge=1)
    anchor_every: int = setting(
        16, "Steps between anchors, versions published whole; sooner when the deltas since come to a whole copy.", ge=1
    )
    keep_checkpoints: int = setting(2, "Checkpoints kept.", ge=1)
    threads: int = setting(1, "Torch threads of the trainer.", ge=1)
    tripwire: bool = setting(
        True, "Replay every rollout before it is trained on; costs one forward pass and memory for a second model."
    )
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535)


class LeaseSection(Section):
    rollouts: int = setting(16, "Rollouts per lease.", ge=1, le=4096)
    lease_s: float = setting(300.0, "Seconds until a lease expires.", gt=0)
    heartbeat_s: float = setting(5.0, "Seconds between heartbeats.", gt=0)
    lost_s: float = setting(20.0, "Seconds without a heartbeat until a node's leases go to others.", gt=0)
    max_lag: int = setting(1, "Steps that a node may work behind the latest while it fetches.", ge=0)
    ahead: float = setting(
        2.0,
        "Groups open or waiting before work is held, as a multiple of `learn.groups`; at least `learn.oversample`.",
        gt=0,
    )


class TrustSection(Section):
    false_ejection_probability: float = setting(1e-6, "Bound on ever ejecting an honest node (alpha).", gt=0, lt=1)
    arbitrary_share: float = setting(3e-4, "Share of honest submissions allowed to be arbitrarily bad.", ge=0, lt=1)
    cap: float = setting(500.0, "Most that one submission may count against a node.", gt=1)
    probation_rollouts: int = setting(64, "Clean audited rollouts before a node is trusted.", ge=1)
    probation_waiting: int = setting(1, "Submissions of one node on probation that may wait for replay.", ge=1)
    probation_slots: int = setting(16, "Nodes on probation whose work may wait for replay at a time.", ge=1)
    audit_scale: float = setting(1.0, "A trusted node is audited with this over its clean rollouts.", ge=0)
    audit_floor: float = setting(
        0.01, "Share of a trusted node's rollouts that is audited for ever, if the budget affords it.", ge=0, le=1
    )
    audit_least: float = setting(0.002, "The same whatever the budget.", ge=0, le=1)
    audit_budget: float = setting(
        0.01, "Most that auditing trusted nodes may cost, as a share of what generation costs.", ge=0, le=1
    )
    canaries: int = setting(
        1, "Rollouts of the trainer's own, each step, that a validator must judge rightly.", ge=0, le=64
    )
    self_test: int = setting(
        8, "Rollouts of the trainer's own, every 4 steps, on which nodes try their arithmetic; 0 for none.", ge=0, le=64
    )
    brake_share: float = setting(
        0.9,
        "Share of the verified work of nodes with a good record: if those that did more fail in one step, verdicts and "
        "training stop; ejections wait until those that did the rest pass.",
        ge=0,
        le=1,
    )
    brake_nodes: int = setting(3, "Nodes with a good record that must fail in one step for either.", ge=1)
    fingerprint: bool = setting(
        False, "Every rollout carries a fingerprint of the activations behind its first tokens, for audits to compare."
    )


class EvalSection(Section):
    tasks: int = setting(512, "Held-out tasks per evaluation; 0 for none.", ge=0)
    every: int = setting(20, "Steps between evaluations; 0 for the first and last policy only.", ge=0)
    samples: int = setting(
        8, "Answers sampled to each of `sampled_tasks`, for pass@k; 0 for greedy evaluation alone.", ge=0, le=1024
    )
    k: int = setting(4, "Pass@k is the chance that one of so many answers is right; at most `samples`.", ge=1, le=1024)
    sampled_tasks: int = setting(64, "Held-out tasks that are sampled, the first ones.", ge=0)
    rollouts: int = setting(128, "Rollouts per eval lease.", ge=1, le=4096)

    @model_validator(mode="after")
    def _k_of_samples(self) -> Self:
        if self.samples and self.k > self.samples:
            raise ValueError(f"pass@{self.k} cannot be estimated from {self.samples} samples; lower k or raise samples")
        return self


class CoordinatorSection(Section):
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(0, "Port to listen on; 0 for any free one.", ge=0, le=65_535)
    processes: int = setting(1, "Processes that answer on the one port, each on a core of its own.", ge=1, le=64)
    database: str = setting(
        "",
        "`sqlite:////file` or `postgresql://user@host/name`; empty for SQLite in the run's folder.",
    )
    blobs: str = setting(
        "", "`file:///folder` or `s3://bucket/prefix?endpoint=URL&region=NAME`; empty for a folder in the run's folder."
    )
    veil: bool = setting(
        True, "Show nobody which rollouts are held for audit, nor M, until their step can no longer be trained on."
    )
    grants: dict[str, Role] = setting({}, "Public key in hex → `trainer`, `validator` or `scorer`; others are workers.")
    admission: Literal["open", "invite", "allow"] = setting(
        "open", "Who may join as worker or relay: anyone, whoever brings an invite, or the nodes of `allow`."
    )
    invites: tuple[str, ...] = setting((), "Invite tokens; give each to one person, and take it out to withdraw it.")
    allow: tuple[str, ...] = setting((), "Node ids that may join when admission is `allow`.")
    admin_token_file: str = setting(
        "", "File with the token that admin routes ask for; FARFLUNG_ADMIN_TOKEN goes before it. Else the key does."
    )
    rate_per_key: float = setting(
        200.0, "Most requests of one key in a second, on average; 0 for no limit. Granted roles have none.", ge=0
    )
    rate_per_address: float = setting(
        2000.0, "Most requests from one address (IPv6: /64) in a second, on average; 0 for no limit.", ge=0
    )
    connections_per_address: int = setting(
        2048, "Most connections from one address (IPv6: /64) to a process at a time; 0 for no limit.", ge=0
    )
    bodies_mb: float = setting(
        256.0, "Most megabytes of submissions that a process receives at a time; 0 for no limit.", ge=0
    )
    rate_burst_s: float = setting(10.0, "Seconds of these rates that may come at once.", ge=0.01, le=3600)
    proxies: tuple[str, ...] = setting(
        (), "Addresses of proxies whose X-Forwarded-For is believed; `*` for any, if nothing else can reach it."
    )
    hosts: tuple[str, ...] = setting(
        (),
        "Names that it is reached by, if any but addresses in digits, names without a dot and `host`; `*` for any. "
        "Empty is any too behind `proxies` or with `tls_cert`, which check the name themselves.",
    )
    tls_cert: str = setting("", "PEM file of the certificate and its chain, to speak https; with `tls_key`.")
    tls_key: str = setting("", "PEM file of its private key.")
    tls_ca: str = setting(
        "", "PEM file of an authority that roles trust beside the usual ones; for join, FARFLUNG_CA_FILE names it."
    )
    minimum_version: int = setting(3, "Oldest protocol version that may join.", ge=0)
    claim_s: float = setting(30.0, "Seconds that a scorer or validator may keep what it claimed.", gt=0)
    mature_steps: int = setting(2, "Commits from a payment until it leaves escrow and is credit.", ge=0)


class RelaySection(Section):
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(0, "Port to listen on; 0 for any free one.", ge=0, le=65_535)
    public_url: str = setting("", "Where nodes reach it, such as http://relay.example:7000; empty for host and port.")
    keep_versions: int = setting(3, "Versions of the weights kept.", ge=1)
    disk_gb: float = setting(0.0, "Most disk for weights; 0 for no bound but what is free.", ge=0)
    poll_s: float = setting(0.2, "Seconds between looks for a new version.", gt=0)
    upstream: tuple[str, ...] = setting((), "Addresses of relays to mirror from; empty for the coordinator alone.")
    per_client: int = setting(16, "Most shards sent to one address at a time.", ge=1)
    at_once: int = setting(256, "Most shards sent at a time.", ge=1)


class WorkerSection(Section):
    engine: Literal["local", "vllm"] = setting("local", "What generates: this process, or a vLLM server.")
    engine_url: str = setting("http://127.0.0.1:8000", "Where the vLLM server is; it must read this node's files.")
    profile: str = setting("", "Numerics profile to compute in, one that the run admits; empty for the run's own.")
    slots: int = setting(
        64, "Rollouts generated at once; a lease holds up to twice as many, which join as others end.", ge=1, le=4096
    )
    pace_tokens_per_s: float = setting(0.0, "Most tokens generated in a second, on average; 0 for no limit.", ge=0)
    threads: int = setting(1, "Torch threads.", ge=1)
    keep_versions: int = setting(3, "Versions of the weights kept on disk.", ge=1)
    disk_gb: float = setting(0.0, "Most disk for weights; 0 for no bound but what is free.", ge=0)
    memory_gb: float = setting(0.0, "Most memory for the model; 0 for half of the machine's.", ge=0)
    upstream: tuple[str, ...] = setting((), "Relays to fetch weights from; empty for those that the run lists.")
    context: int = setting(0, "Longest prompt and completion taken, in tokens; 0 for no limit.", ge=0)
    ignore_self_test: bool = setting(
        False, "Work even if this machine's arithmetic is noisier than its profile allows."
    )
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535)


class ValidatorSection(Section):
    threads: int = setting(1, "Torch threads.", ge=1)
    claim: int = setting(32, "Audits claimed at once.", ge=1, le=1024)
    linger_s: float = setting(
        4.0, "Seconds that audits of trusted nodes may wait for company; many are replayed cheaper.", ge=0, le=600
    )
    slots: int = setting(128, "Rollouts generated at once when evaluating.", ge=1, le=4096)
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535)


class ScorerSection(Section):
    children: int = setting(2, "Processes that score.", ge=1, le=64)
    claim: int = setting(64, "Transcripts claimed at once.", ge=1, le=1024)
    timeout_s: float = setting(5.0, "Seconds for one score.", gt=0)
    faults: int = setting(3, "Faults until a rollout is given up as unscorable.", ge=1)
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535)


class Cheat(Section):
    name: str = setting("mallory", "Name of the node.")
    attack: str = setting("unseeded", "Which adversary of the gallery it is.")


class SwarmSection(Section):
    workers: int = setting(4, "Honest workers.", ge=0, le=64)
    cheats: tuple[Cheat, ...] = setting((), "Dishonest workers.")
    kill: int = setting(0, "Further workers that are killed (-9) while they hold a lease.", ge=0, le=16)
    validators: int = setting(1, "Validators.", ge=0, le=8)
    relays: int = setting(0, "Relays.", ge=0, le=8)


class ChaosSection(Section):
    every_s: float = setting(25.0, "Seconds between faults.", gt=0)
    seed: int = setting(0, "Seed of the schedule of faults.")
    postgres: bool = setting(False, "Have a PostgreSQL server of the run's own, and kill it too, instead of SQLite.")


class PricesSection(Section):
    worker_usd_per_hour: float = setting(0.22, "One worker: a consumer card as rented in 2026.", ge=0)
    trainer_usd_per_hour: float = setting(2.0, "The trainer: one data-centre accelerator as rented in 2026.", ge=0)
    validator_usd_per_hour: float = setting(0.22, "One validator.", ge=0)
    coordinator_usd_per_hour: float = setting(0.05, "The coordinator with its scorer: a small virtual machine.", ge=0)


class SinksSection(Section):
    wandb_project: str = setting("", "Project at Weights & Biases for step metrics; empty for none.")
    trackio_project: str = setting("", "Project in Trackio for step metrics; empty for none.")


class Config(Section):
    """Everything that can be set."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    env: EnvSection = EnvSection()
    generate: GenerateSection = GenerateSection()
    learn: LearnSection = LearnSection()
    lease: LeaseSection = LeaseSection()
    trust: TrustSection = TrustSection()
    eval: EvalSection = EvalSection()
    coordinator: CoordinatorSection = CoordinatorSection()
    worker: WorkerSection = WorkerSection()
    validator: ValidatorSection = ValidatorSection()
    relay: RelaySection = RelaySection()
    scorer: ScorerSection = ScorerSection()
    swarm: SwarmSection = SwarmSection()
    chaos: ChaosSection = ChaosSection()
    prices: PricesSection = PricesSection()
    sinks: SinksSection = SinksSection()
    _place: tuple[Path, str, Path] | None = PrivateAttr(default=None)
    """`run.dir`, `run.name` and the folder where the run with these two is in fact, once it was moved."""

    @model_validator(mode="after")
    def _lengths_within_budget(self) -> Self:
        if self.env.lengths and max(self.env.lengths) > self.generate.budget:
            raise ValueError(f"env.lengths {self.env.lengths} go beyond generate.budget = {self.generate.budget}")
        return self

    def lockstep_groups(self, policy: int) -> int:
        """Groups that are generated with the policy of a step, in lockstep: the first ones train on the base model."""
        return self.learn.groups * (self.learn.max_staleness + 1 if policy == 0 else 1)

    @property
    def folder(self) -> Path:
        """Where the run keeps its files."""
        if self._place and self._place[:2] == (self.run.dir, self.run.name):
            return self._place[2]
        return self.run.dir / self.run.name

    def at(self, folder: Path) -> "Config":
        """The same run in the folder where it is by now, wherever it was founded and whatever it was called."""
        model = self.model.model_copy(
            update={
                "profile": _moved(self.model.profile, folder),
                "profiles": tuple(_moved(name, folder) for name in self.model.profiles),
            }
        )
        config = self.model_copy(update={"model": model})
        config._place = (self.run.dir, self.run.name, folder)
        return config

    @property
    def scheme(self) -> Literal["http", "https"]:
        """How the coordinator is spoken to where no proxy is in front."""
        return "https" if self.coordinator.tls_cert else "http"

    @property
    def database_url(self) -> str:
        """The database, embedded by default."""
        return self.coordinator.database or f"sqlite:///{self.folder.resolve() / 'farflung.db'}"

    @property
    def blobs_url(self) -> str:
        """The blob store, embedded by default."""
        return self.coordinator.blobs or f"file://{self.folder.resolve() / 'blobs'}"

    @property
    def submissions_url(self) -> str:
        """Where submissions are kept, apart from what anybody may fetch by digest."""
        parts = urlsplit(self.blobs_url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/submissions"))

    def eval_steps(self, latest: int) -> list[int]:
        """The policy steps up to `latest` that are to be evaluated."""
        every, last = self.eval.every, self.run.steps
        due = {0, last} | (set(range(0, last, every)) if every else set())
        return sorted(step for step in due if step <= latest) if self.eval.tasks else []


def load(path: Path | None, flags: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Config:
    """Read a configuration. Raises ConfigError with one sentence for whatever is wrong.

    The config.json in a run's folder means the run in that folder, unless a flag or variable names another.
    """
    tree = _read(path) if path else {}
    own = _run_of(tree)
    for key, value in environ.items():
        if key.startswith(PREFIX) and "__" in key:
            _set(tree, key.removeprefix(PREFIX).lower().split("__"), value)
    for dotted, value in _flags(flags):
        _set(tree, dotted.split("."), value)
    config = _anchor(_parse(tree, path), path.parent if path else Path())
    if path and path.name == SAVED and own == _run_of(tree) and any((path.parent / name).exists() for name in OF_A_RUN):
        return config.at(path.parent)
    return config


def load_run(folder: Path) -> Config:
    """The configuration of the run in a folder, as it was saved there. Raises ConfigError."""
    if not (folder / SAVED).exists():
        raise ConfigError(f"{folder} holds no run: {SAVED} is missing")
    return load(folder / SAVED, environ={}).at(folder)


def _run_of(tree: dict[str, Any]) -> tuple[Any, Any]:
    run = tree.get("run")
    return (run.get("dir"), run.get("name")) if isinstance(run, dict) else (None, None)


def _read(path: Path) -> dict[str, Any]:
    """A file as a tree, whatever the locale; the mark that some editors put first is passed over."""
    kind = path.suffix[1:].upper() or "TOML"
    try:
        text = path.read_bytes().decode("utf-8-sig")
        tree = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not text in UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}); save it as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid {kind}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; write one object with a section per role")
    return tree


def _flags(flags: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(flags)
    while rest:
        name, joined, value = rest.pop(0).partition("=")
        if not name.startswith("--") or "." not in name:
            raise ConfigError(f"{name!r} is no setting; write --section.key value, for example --run.seed 3")
        if not joined:
            if not rest:
                raise ConfigError(f"{name} has no value; write {name} VALUE")
            value = rest.pop(0)
        yield name[2:].replace("-", "_"), value


def _set(tree: dict[str, Any], keys: Sequence[str], text: str) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} is a value, not a section")
    try:
        tree[keys[-1]] = json.loads(text)
    except (ValueError, RecursionError):
        tree[keys[-1]] = text


def _parse(tree: dict[str, Any], path: Path | None) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        source = f"{path}: " if path else ""
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{source}unknown key {where!r}; {_nearest(where)}") from error
        raise ConfigError(f"{source}{where} = {first['input']!r}: {first['msg']}") from error


def _nearest(where: str) -> str:
    close = difflib.get_close_matches(where, [name for name, _ in fields()], n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "docs/config.md lists all keys"


def fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield prefix + name, field
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _anchor(config: Config, base: Path) -> Config:
    """Paths in a file are relative to that file."""
    model, env = config.model, config.env
    if model.path and (base / model.path).exists():
        model = model.model_copy(update={"path": str((base / model.path).resolve())})
    name, colon, attribute = env.name.partition(":")
    if name.endswith((".py", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")) and (base / name).exists():
        env = env.model_copy(update={"name": str((base / name).resolve()) + colon + attribute})
    if env.keep and (base / env.keep).exists():
        env = env.model_copy(update={"keep": str((base / env.keep).resolve())})
    return config.model_copy(update={"model": model, "env": env})


def _moved(name: str, folder: Path) -> str:
    """A profile that was made for the run whose folder was elsewhere then; any other stays as it is."""
    here = folder / "profiles" / Path(name).name
    return str(here.resolve()) if name.endswith(".json") and not Path(name).exists() and here.exists() else name


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration beside the run, whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draft.replace(path)
