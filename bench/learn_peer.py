"""The peer of `learn.py`, run in an environment of its own: TRL's GRPOTrainer on the tasks of a JSON file.

    python learn_peer.py SPEC.json STEPS.jsonl

SPEC names model, tasks, groups, samples, max_new_tokens, lr, betas, seed, threads, is_bf16, most_steps and until. One
line is written per step: its number, wall and CPU-seconds since training began, mean reward and completion tokens.
Training ends once the mean reward of five steps reaches `until`. The reward is the last number of the reply, compared
as farflung compares it.
"""

import json
import os
import sys
import time
from pathlib import Path

SPEC = json.loads(Path(sys.argv[1]).read_text())
os.environ["OMP_NUM_THREADS"] = str(SPEC["threads"])

import torch  # noqa: E402 - after the number of threads is set
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from farflung.envs import answers  # noqa: E402

WINDOW = 5


class Curve(TrainerCallback):
    """Writes a line per step and stops where the peer has learned enough."""

    def __init__(self, path: Path) -> None:
        self.path, self.rewards, self.began, self.cpu_began = path, [], 0.0, 0.0

    def on_train_begin(self, args, state, control, **more) -> None:
        self.began, self.cpu_began = time.monotonic(), time.process_time()

    def on_log(self, args, state, control, logs=None, **more) -> None:
        if "reward" not in (logs or {}):
            return
        self.rewards.append(logs["reward"])
        tokens = round(logs["completions/mean_length"] * SPEC["groups"] * SPEC["samples"])
        seconds, cpu_s = time.monotonic() - self.began, time.process_time() - self.cpu_began
        line = {"step": state.global_step, "at_s": seconds, "cpu_s": cpu_s, "reward": logs["reward"], "tokens": tokens}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        last = self.rewards[-WINDOW:]
        if len(last) == WINDOW and sum(last) / WINDOW >= SPEC["until"]:
            control.should_training_stop = True


def reward(completions: list[list[dict[str, str]]], answer: list[str], **more: object) -> list[float]:
    """1 where the last number of the reply is the answer, else 0."""
    said = [answers.last_number(completion[0]["content"]) for completion in completions]
    return [float(answers.same(found, right)) for found, right in zip(said, answer, strict=True)]


def main() -> None:
    torch.set_num_threads(SPEC["threads"])
    count = SPEC["groups"] * SPEC["samples"]
    at_once = min(16, count)  # faster than recomputing activations, and fits beside the logits
    settings = GRPOConfig(
        output_dir=SPEC["folder"],
        learning_rate=SPEC["lr"],
        lr_scheduler_type="constant",
        adam_beta1=SPEC["betas"][0],
        adam_beta2=SPEC["betas"][1],
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=count // at_once,
        gradient_checkpointing=False,
        num_generations=SPEC["samples"],
        max_completion_length=SPEC["max_new_tokens"],
        temperature=1.0,
        max_steps=SPEC["most_steps"],
        seed=SPEC["seed"],
        bf16=SPEC["is_bf16"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(SPEC["model"], dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(SPEC["model"]),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(SPEC["tasks"]),
        callbacks=[Curve(Path(sys.argv[2]))],
    )
    trainer.train()


if __name__ == "__main__":
    main()
