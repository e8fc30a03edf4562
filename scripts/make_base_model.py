"""Make the demo's base model: it works three-digit sums from the units, and forgets to carry more often than not.

A Qwen3-shaped model of 0.8M parameters with its own 32-character tokenizer, trained on worked sums in whose text
each carry is dropped with probability 0.6. So both ways of going on are alive in it, the greedy one mostly wrong,
and reinforcement learning has a flaw to mend that one can read. It sees training questions only, none held out.

    python scripts/make_base_model.py                    about three minutes on two CPU cores; writes examples/base/

The scores printed at the end are those of the folder as written: read back, weights rounded to bf16.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from farflung.envs.sums import Sums, worked

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = "0123456789+=: -*/().,?<>abcd"
PAD, BOS, EOS, UNK = range(4)
IGNORED = -100
# Shape suffixes: B batch, T token, V vocabulary.


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, nothing added: the ids of a prompt are those of its letters."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )


def make_model(options: argparse.Namespace) -> Qwen3ForCausalLM:
    """An untrained model in fp32."""
    config = Qwen3Config(
        vocab_size=len(SPECIAL) + len(CHARACTERS),
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.hidden // 4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Qwen3ForCausalLM(config)


def examples(env: Sums, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) of training questions, carries dropped at random."""
    rng = random.Random(options.seed)
    for task in env.tasks("train"):
        yield env.prompt(task), worked(task["terms"], lambda: rng.random() >= options.drop)


def batch(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels, padded on the right; only completions and their end are learned."""
    rows = [(tokenizer.encode(prompt), [*tokenizer.encode(completion), EOS]) for prompt, completion in pairs]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids_BT = torch.full((len(rows), width), PAD)
    labels_BT = torch.full((len(rows), width), IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        ids_BT[row, :end] = torch.tensor(prompt + completion)
        labels_BT[row, len(prompt) : end] = torch.tensor(completion)
    return ids_BT, (ids_BT != PAD).long(), labels_BT


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, env: Sums, options: argparse.Namespace) -> None:
    """AdamW on the next character; the rate falls to 0.3 of itself for the last part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    stream = examples(env, options)
    started = time.monotonic()
    for step in range(options.steps):
        falls = 0.3 if step >= options.steps * 0.75 else 1.0
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 30) * falls
        ids_BT, mask_BT, labels_BT = batch(tokenizer, list(itertools.islice(stream, options.batch)))
        loss = model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step={step + 1} loss={loss.item():.4f} wall_s={time.monotonic() - started:.0f}", flush=True)


@torch.no_grad()
def replies(model: Qwen3ForCausalLM, prompts_BT: torch.Tensor, is_greedy: bool, max_new: int = 32) -> torch.Tensor:
    """Complete prompts of equal length at temperature 1 or greedily; behind an end stands padding."""
    cache, ids_BT, ended_B = None, prompts_BT, torch.zeros(len(prompts_BT), dtype=torch.bool)
    said: list[torch.Tensor] = []
    while len(said) < max_new and not ended_B.all():
        output = model(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        cache, logits_BV = output.past_key_values, output.logits[:, -1].float()
        drawn_B1 = logits_BV.argmax(-1, keepdim=True) if is_greedy else torch.multinomial(logits_BV.softmax(-1), 1)
        ids_BT = drawn_B1.masked_fill(ended_B[:, None], PAD)
        said.append(ids_BT)
        ended_B = ended_B | (ids_BT[:, 0] == EOS)
    return torch.cat(said, 1)


def measure(folder: Path, env: Sums, count: int) -> dict[str, float]:
    """Held-out pass rates, greedy and at temperature 1, of the folder as anyone would load it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = list(itertools.islice(env.tasks("eval"), count))
    prompts_BT = torch.tensor([tokenizer.encode(env.prompt(task)) for task in tasks])
    found: dict[str, float] = {"eval_tasks": len(tasks)}
    for name, is_greedy in (("greedy", True), ("sampled", False)):
        ids_BT = replies(model, prompts_BT, is_greedy)
        texts = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        scores = [env.score(task, text) for task, text in zip(tasks, texts, strict=True)]
        found[f"eval_{name}"] = sum(score.reward for score in scores) / len(scores)
        found[f"format_{name}"] = sum(score.parts["format"] for score in scores) / len(scores)
        found[f"tokens_{name}"] = (ids_BT != PAD).sum().item() / len(scores)
    return found


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights in bf16 and the tokenizer as any loader expects them."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=32,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    told = {
        **json.loads(settings.read_text()),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # the name all loaders know
    settings.write_text(json.dumps(told, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone


def main() -> None:
    """Make, train, write, read back and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "examples" / "base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=int, default=3)
    parser.add_argument("--drop", type=float, default=0.6, help="probability that the text drops a carry")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--eval-tasks", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    env, tokenizer, model = Sums(digits=options.digits), make_tokenizer(), make_model(options)
    train(model, tokenizer, env, options)
    save(model, tokenizer, options.out)
    size_bytes = sum(file.stat().st_size for file in options.out.iterdir())
    figures = {"parameters": model.num_parameters(), "size_bytes": size_bytes}
    print(json.dumps({**figures, **measure(options.out, env, options.eval_tasks)}))


if __name__ == "__main__":
    main()
