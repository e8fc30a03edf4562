"""Settings of learning: the run, its model and environment, generation, training, evaluation."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from farflung.config.section import DEVICE, Section, setting

MOST_STOPS, STOP_BYTES = 4, 32


class RunSection(Section):
    name: str = setting(
        "run", "Name of the run; its files are under `dir`/`name`.", pattern=r"^[a-z0-9][a-z0-9-]{0,40}$"
    )
    dir: Path = setting(Path("runs"), "Folder of all runs, relative to where the command is given.")
    steps: int = setting(100, "Training steps, then the run ends.", ge=1)
    seed: int = setting(0, "Seed of task order and training.")
    reproducible: bool = setting(
        False,
        "Derive the secret from the seed. Tests and demos only: a node that knows the seed knows the noise.",
        is_advanced=True,
    )


class ModelSection(Section):
    path: str = setting("", "Folder of a Hugging Face causal LM, or its hub id.")
    profile: str = setting(
        "torch-cpu-fp32", "Numerics profile of nodes that pick none: a name or a JSON file.", is_advanced=True
    )
    profiles: tuple[str, ...] = setting(
        (), "Further profiles that nodes may pick; each is judged by its own.", is_advanced=True
    )


class EnvSection(Section):
    name: str = setting(
        "sums", "`sums`, `reasoning_gym:TASK`, `path/to/file.py:Class` or `path/to/questions.jsonl` (or .json, .csv)."
    )
    args: dict[str, Any] = setting({}, "Keyword arguments of the environment.")
    train_tasks: int = setting(4096, "Training tasks taken from the environment.", ge=1, le=1_000_000)
    eval_tasks: int = setting(512, "Held-out tasks taken from the environment.", ge=0, le=100_000)
    keep: str = setting("", "File of `farflung filter-tasks`: train on its tasks only; empty for all.")
    lengths: tuple[int, ...] = setting(
        (),
        "Lengths in tokens, one of which each prompt names, drawn from the task and `run.seed`; empty for none.",
        is_advanced=True,
    )
    length_weight: float = setting(
        0.0003, "Taken from a training reward for each token that the length is off its target.", ge=0, is_advanced=True
    )
    length_prompt: str = setting(
        "{prompt}\nThink for about {tokens} tokens before you answer.",
        "How a prompt names its length.",
        is_advanced=True,
    )
    python: str = setting(
        "", "Interpreter for the environment, when it needs packages of its own; empty for this one.", is_advanced=True
    )

    @model_validator(mode="after")
    def _lengths_are_told(self) -> Self:
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths {self.lengths} are numbers of tokens, each at least 1")
        if self.lengths and not ("{prompt}" in self.length_prompt and "{tokens}" in self.length_prompt):
            raise ValueError(f"length_prompt {self.length_prompt!r} must hold {{prompt}} and {{tokens}}")
        return self


class GenerateSection(Section):
    samples: int = setting(16, "Samples per group (G).", ge=2, le=4096)
    temperature: float = setting(1.0, "Sampling temperature; stock engines take 0.01 to 2.", ge=0.01, le=2)
    max_new_tokens: int = setting(256, "Most new tokens per rollout, the end token included.", ge=1, le=131_072)
    stop: tuple[str, ...] = setting(
        (), "Strings that end a rollout with the token that completes one; the scored text stands before it."
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
    curriculum: Literal["thompson", "uniform"] = setting(
        "thompson",
        "How a step's tasks are drawn: those likely to have variance in reward first, or all alike.",
    )
    oversample: float = setting(
        4.0,
        "A group without variance is replaced until a step has this multiple of `groups`; then it closes with fewer.",
        ge=1,
        is_advanced=True,
    )
    max_staleness: int = setting(2, "Most steps between the policy that generated and the one trained.", ge=0)
    lockstep: bool = setting(
        False,
        "Step s trains on the groups of policy s - 1 - max_staleness, all and only those: same run, same weights.",
        is_advanced=True,
    )
    lr: float = setting(1e-6, "Learning rate of AdamW.", gt=0)
    warmup_steps: int = setting(0, "Optimizer steps of linear warm-up.", ge=0, is_advanced=True)
    minibatches: int = setting(
        1, "Optimizer steps per training step; micro-batches are made small enough.", ge=1, is_advanced=True
    )
    beta1: float = setting(0.9, "AdamW's decay of the gradient's mean.", ge=0, lt=1, is_advanced=True)
    beta2: float = setting(0.99, "AdamW's decay of the gradient's square.", ge=0, lt=1, is_advanced=True)
    loss: Literal["grpo", "cispo", "gspo"] = setting(
        "grpo", "Two-sided clip per token, clipped importance weights, or one ratio per rollout."
    )
    epsilon: float = setting(
        0.2, "Clip of the ratio below 1, and above where `epsilon_high` is 0.", gt=0, lt=1, is_advanced=True
    )
    epsilon_high: float = setting(0.0, "Clip of the ratio above 1; 0 for `epsilon`.", ge=0, is_advanced=True)
    delta: float = setting(4.0, "Upper bound of the ratio where the advantage is negative.", gt=1, is_advanced=True)
    normalise: Literal["token", "sequence", "constant"] = setting(
        "token", "How token losses are averaged.", is_advanced=True
    )
    divide_by_std: bool = setting(True, "Divide advantages by the group's standard deviation.", is_advanced=True)
    kl: float = setting(0.0, "Weight of the KL to the base model, which is then held in memory too.", ge=0)
    entropy: float = setting(0.0, "Weight of the entropy that is rewarded.", ge=0, is_advanced=True)
    quantised_share: float = setting(
        1.0,
        "Largest share of the rollouts under way that nodes with quantised weights may have, if profiles of such are "
        "admitted.",
        ge=0,
        le=1,
        is_advanced=True,
    )
    importance_cap: float = setting(
        2.0,
        "Most that a stale token counts by its importance weight; 0 to take stale tokens as they are.",
        ge=0,
        is_advanced=True,
    )
    max_grad_norm: float = setting(1.0, "Gradient clipping.", gt=0, is_advanced=True)
    weight_decay: float = setting(0.0, "AdamW weight decay.", ge=0, is_advanced=True)
    microbatch_tokens: int = setting(8192, "Tokens per forward pass, padding included.", ge=1)
    device: str = setting(
        "auto",
        "What training computes on: auto for the best there is, cpu, cuda, cuda:N, mps or xpu.",
        pattern=DEVICE,
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Arithmetic of training; masters are float32. `auto` is bfloat16 where the machine has it, else float32.",
        is_advanced=True,
    )
    rounding: Literal["dithered", "nearest"] = setting(
        "dithered",
        "How masters become the bfloat16 that is published: small updates show at once, or once they add up.",
        is_advanced=True,
    )
    lora_rank: int = setting(0, "Train adapters of this rank and nothing else; 0 for all weights.", ge=0, le=4096)
    lora_scale: float = setting(2.0, "The factor of an adapter's product.", gt=0, is_advanced=True)
    lora_publish: Literal["adapters", "merged"] = setting(
        "adapters",
        "How a step with `lora_rank` travels: adapters, which nodes merge into the base (`dithered`, whatever "
        "`rounding` is), or the difference of merged weights.",
        is_advanced=True,
    )
    checkpointing: bool = setting(False, "Recompute activations in the backward pass to save memory.")
    moments: Literal["device", "host"] = setting(
        "device",
        "Where AdamW's moments live: on the device, or in host memory, which takes half of training off the device.",
    )
    checkpoint_every: int = setting(
        1, "Steps between checkpoints; those between are replayed after a crash.", ge=1, is_advanced=True
    )
    anchor_every: int = setting(
        16,
        "Steps between anchors, versions published whole; sooner when the deltas since come to a whole copy.",
        ge=1,
        is_advanced=True,
    )
    keep_checkpoints: int = setting(2, "Checkpoints kept.", ge=1, is_advanced=True)
    threads: int = setting(1, "Torch threads of the trainer.", ge=1)
    tripwire: bool = setting(
        True,
        "Replay every rollout before it is trained on; costs one forward pass and memory for a second model.",
        is_advanced=True,
    )
    metrics_port: int = setting(0, "Port on 127.0.0.1 for Prometheus; 0 for none.", ge=0, le=65_535, is_advanced=True)

    @property
    def is_adapters_alone(self) -> bool:
        """Whether a step travels as adapters beside its base."""
        return self.lora_rank > 0 and self.lora_publish == "adapters"


class EvalSection(Section):
    tasks: int = setting(512, "Held-out tasks per evaluation; 0 for none.", ge=0)
    every: int = setting(20, "Steps between evaluations; 0 for the first and last policy only.", ge=0)
    samples: int = setting(
        8, "Answers sampled to each of `sampled_tasks`, for pass@k; 0 for greedy evaluation alone.", ge=0, le=1024
    )
    k: int = setting(4, "Pass@k is the chance that one of so many answers is right; at most `samples`.", ge=1, le=1024)
    sampled_tasks: int = setting(64, "Held-out tasks that are sampled, the first ones.", ge=0, is_advanced=True)
    rollouts: int = setting(128, "Rollouts per eval lease.", ge=1, le=4096, is_advanced=True)

    @model_validator(mode="after")
    def _k_of_samples(self) -> Self:
        if self.samples and self.k > self.samples:
            raise ValueError(f"pass@{self.k} cannot be estimated from {self.samples} samples; lower k or raise samples")
        return self
