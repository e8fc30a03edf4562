"""A model folder that cannot work is refused in one sentence before a run is founded."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from farflung.numerics.model_files import find, is_cut_off, read
from farflung.numerics.weight_files import entries, refuse_infinite
from farflung.protocol.errors import ConfigError
from farflung.tasks.model import Model
from farflung.tasks.model_check import refuse_long, refuse_unfit

BASE = Path(__file__).parents[2] / "examples" / "base"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1600000\n"
PAGE = "<!DOCTYPE html><html><title>Not found</title></html>"
WEIGHTS = {"embed.weight": np.ones((32, 4), np.float32), "layer.weight": np.ones((4, 4), np.float16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that is well, with weights of no architecture: here nobody builds it."""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / name)
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


def check(folder: Path) -> list[str]:
    said: list[str] = []
    refuse_unfit(Model(str(folder)), said.append)
    return said


def edit(name: str, *without: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        kept = {key: value for key, value in fields.items() if key not in without}
        (folder / name).write_text(json.dumps(kept | changes))

    return change


def write(name: str, data: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def weights(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: save_file(WEIGHTS | changes, folder / "model.safetensors")


def instead(*names: str, **fields: Any) -> Callable[[Path], object]:
    """Other files in place of the weights."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_text(json.dumps(fields) if name.endswith(".json") else "")

    return change


def cut(at: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:at])

    return change


def shards(missing: int = 0, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        places = {}
        for number, (name, tensor) in enumerate(WEIGHTS.items(), 1):
            places[name] = f"model-0000{number}-of-00002.safetensors"
            if number != missing:
                save_file({name: tensor}, folder / places[name])
        index = {"weight_map": places} | fields
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def header(text: str, rest: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + rest


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> str:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})


def vocabulary(**tokens: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        fields = json.loads((folder / "tokenizer.json").read_text())
        fields["model"]["vocab"] |= tokens
        (folder / "tokenizer.json").write_text(json.dumps(fields))

    return change


WELL = {
    "as it is": edit("config.json"),
    "shards": shards(),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "several end tokens": edit("generation_config.json", eos_token_id=[2, 24]),
    "64 end tokens": edit("generation_config.json", eos_token_id=[number % 32 for number in range(64)]),
    "no padding": edit("config.json", pad_token_id=None),
    "padding from the end": edit("config.json", pad_token_id=-1),
    "an empty tensor": weights(nothing=np.ones((0, 4), np.float32), flag=np.array([True]), n=np.array(3)),
    "all layers": weights(**{f"model.layers.{number}.x": np.ones(1, np.float32) for number in range(5)}),
    "tied twice": weights(
        **{"embed_tokens.weight": np.ones((32, 3), np.float32), "lm_head.weight": np.ones((32, 3), np.float32)}
    ),
    "both formats": write("pytorch_model.bin", b"\x80"),
    "byte order mark": lambda folder: write("config.json", b"\xef\xbb\xbf" + (BASE / "config.json").read_bytes())(
        folder
    ),
    "an adapter beside it": write("adapter_config.json", "{}"),
    "code that is not needed": edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
}

UNFIT = {
    "pointer": (write("model.safetensors", POINTER), "git-lfs pointer .* `git lfs pull`"),
    "pointer as a shard": (
        lambda folder: (shards()(folder), write("model-00002-of-00002.safetensors", POINTER)(folder)),
        "00002-of-00002.safetensors is a git-lfs pointer",
    ),
    "pointer as a tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json is a git-lfs pointer"),
    "pointer as a config": (write("config.json", POINTER), "config.json is a git-lfs pointer"),
    "cut in the weights": (cut(400), "has 400 bytes where its header promises"),
    "cut in the header": (cut(50), "no safetensors file, or cut off after 50 bytes"),
    "empty": (cut(0), "cut off after 0 bytes"),
    "longer": (write("model.safetensors", header(entry(), bytes(9))), "9 bytes where|it is damaged"),
    "page as weights": (write("model.safetensors", PAGE), "no safetensors file"),
    "header no JSON": (write("model.safetensors", header("{x")), "its header cannot be read"),
    "header no object": (write("model.safetensors", header("[1]")), "its header cannot be read"),
    "header of other types": (write("model.safetensors", header(entry("Q9"), bytes(4))), "its header cannot be read"),
    "header with other sizes": (write("model.safetensors", header(entry(shape=(9,)), bytes(4))), "cannot be read"),
    "header before itself": (write("model.safetensors", header(entry(offsets=(-4, 0)), bytes(4))), "cannot be read"),
    "no weights": (instead(), "no weights, there is no model.safetensors"),
    "pickle": (instead("pytorch_model.bin"), "pytorch_model.bin alone, .* never opened .* use_safetensors=False"),
    "old pickle": (instead("consolidated.00.pth"), "consolidated.00.pth alone"),
    "gguf": (instead("model-Q4_K_M.gguf"), "Q4_K_M.gguf alone; take the model's safetensors"),
    "adapter": (instead("adapter_config.json", "adapter_model.safetensors"), "adapter .* merge_and_unload"),
    "adapter as pickle": (instead("adapter_model.bin"), "adapter .* merge_and_unload"),
    "shards without index": (instead("model-00001-of-00002.safetensors"), "00001-of-00002.safetensors, but neither"),
    "shard missing": (shards(missing=2), "shard model-00002-of-00002.safetensors of the 2"),
    "shard elsewhere": (shards(weight_map={"x": "../model.safetensors"}), "shard ../model.safetensors"),
    "index without map": (shards(weight_map=[1]), "no weight_map"),
    "index no JSON": (instead("model.safetensors.index.json", weight_map={}), "no weight_map"),
    "layer missing": (
        weights(**{f"model.layers.{number}.x": np.ones(1, np.float32) for number in (0, 1, 3)}),
        "lack layer 2 of the 4",
    ),
    "rows": (weights(**{"wte.weight": np.ones((40, 4), np.float32)}), "wte.weight of .* shape .40, 4., .* is 32"),
    "head missing": (
        lambda folder: (
            edit("config.json", tie_word_embeddings=False)(folder),
            weights(**{"wte.weight": np.ones((32, 3), np.float32)})(folder),
        ),
        "lack an output head",
    ),
    "head of its own": (
        weights(
            **{"embed_tokens.weight": np.ones((32, 3), np.float32), "lm_head.weight": np.zeros((32, 3), np.float32)}
        ),
        "lm_head.weight and embed_tokens.weight .* differ",
    ),
    "NaN": (weights(bad=np.array([1, np.nan], np.float32)), "tensor bad of .*infinite or no numbers"),
    "half infinite": (weights(bad=np.array([[np.inf]], np.float16)), "tensor bad of .*infinite or no numbers"),
    "bitsandbytes": (
        edit("config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"quantised \(bitsandby",
    ),
    "gptq": (edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), r"quantised \(gptq"),
    "inner fp8": (
        edit("config.json", text_config={"quantization_config": {"quant_method": "fp8"}}),
        r"quantised \(fp8",
    ),
    "packed names": (weights(**{"layer.qweight": np.ones(1, np.int32)}), "quantised: tensor layer.qweight"),
    "float8": (write("model.safetensors", header(entry("F8_E4M3", (4,)), bytes(4))), "quantised: tensor x"),
    "end token unknown": (edit("generation_config.json", eos_token_id=999), r"eos_token_id 999, .*\(0 to 31\)"),
    "one of them unknown": (edit("generation_config.json", eos_token_id=[2, 32]), "eos_token_id 32"),
    "end token negative": (edit("generation_config.json", eos_token_id=-1), "eos_token_id -1"),
    "end token a word": (edit("generation_config.json", eos_token_id="</s>"), "eos_token_id '</s>'"),
    "end token an object": (edit("generation_config.json", eos_token_id={"a": 1}), "eos_token_id"),
    "no end token": (edit("generation_config.json", eos_token_id=[]), "names no end token"),
    "too many end tokens": (
        edit("generation_config.json", eos_token_id=list(range(65))),
        "65 end tokens and at most",
    ),
    "end token nowhere": (
        lambda folder: (
            edit("generation_config.json", "eos_token_id")(folder),
            edit("config.json", "eos_token_id")(folder),
        ),
        "names no eos_token_id",
    ),
    "padding unknown": (edit("config.json", pad_token_id=32), "pad_token_id 32, .*write null"),
    "tokenizer larger": (vocabulary(é=32), "token 'é' with id 32, but the embedding ends at 31"),
    "page as a config": (write("config.json", PAGE), "config.json .* is no JSON .*<!DOCTYPE html>"),
    "list as a config": (write("config.json", "[1]"), "holds no JSON object"),
    "binary as a config": (write("config.json", b"\xff\xfe\x00"), "is no JSON"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no model type": (edit("config.json", "model_type"), "names no model_type"),
    "unknown model type": (
        edit("config.json", model_type="lama"),
        "model_type 'lama', which transformers does not",
    ),
    "code of its own": (
        edit("config.json", model_type="xyz", auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        r"code of its own \(auto_map\) is never run",
    ),
    "no vocabulary": (edit("config.json", "vocab_size"), "vocab_size = None"),
    "page as generation config": (write("generation_config.json", PAGE), "generation_config.json .* is no JSON"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json; .*AutoTokenizer"),
    "page as a tokenizer": (write("tokenizer.json", PAGE), "tokenizer.json .* is no JSON"),
    "other tokenizer": (
        write("tokenizer.json", '{"model": {"type": "Q"}}'),
        "describes no tokenizer",
    ),
}


@pytest.mark.parametrize("change", WELL.values(), ids=WELL)
def test_a_model_that_is_well(folder: Path, change: Callable[[Path], object]) -> None:
    change(folder)
    assert check(folder) == []


@pytest.mark.parametrize(("change", "words"), UNFIT.values(), ids=UNFIT)
def test_an_unfit_model_is_one_sentence(folder: Path, change: Callable[[Path], object], words: str) -> None:
    change(folder)
    with pytest.raises(ConfigError, match=words) as caught:
        check(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bfloat16_that_is_no_number_is_found(tmp_path: Path, value: float) -> None:
    """numpy has no such type: its bits are looked at."""
    values = np.array([3e38, -1e-40, 0, value], np.float32).view(np.uint32) >> 16
    for upto in (3, 4):
        data = values[:upto].astype(np.uint16).tobytes()
        (tmp_path / "model.safetensors").write_bytes(header(entry("BF16", [upto], [0, 2 * upto]), data))
        stored = entries(tmp_path)
        if upto == 3:
            refuse_infinite(stored, print)
    with pytest.raises(ConfigError, match="tensor x of"):
        refuse_infinite(stored, print)


def test_what_takes_long_is_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farflung.numerics.weight_files.PATIENCE_S", -1.0)
    assert check(folder) == ["looking through 0.0 GB of weights"]


@pytest.mark.parametrize(
    ("fields", "table", "words"),
    [
        ({"max_position_embeddings": 24}, {}, ""),
        ({"max_position_embeddings": 24}, {"visual.pos.position_embedding.weight": 16}, ""),
        ({"model_type": "gpt2", "n_positions": 24}, {}, "of 9 tokens and .* = 16 come to 25 .* 24 positions"),
        ({"model_type": "odd", "n_positions": 24}, {"h.wpe.weight": 24}, "of 9 tokens and .* = 16 come to 25 tokens"),
        ({"max_position_embeddings": 24}, {"m.embed_positions.weight": 26}, "24 positions .max_position_embeddings"),
        ({"model_type": "opt", "text_config": {"max_position_embeddings": 24}}, {}, "24 positions"),
    ],
)
def test_texts_beyond_the_last_position(folder: Path, caplog, fields: Any, table: Any, words: str) -> None:
    """Refused where positions were learned one by one; others go on, with a warning."""
    edit("config.json", "max_position_embeddings", **fields)(folder)
    weights(**{name: np.ones((rows, 4), np.float32) for name, rows in table.items()})(folder)
    model = Model(str(folder))
    refuse_long(model, [3, 8], 16)
    refuse_long(model, [], 16)
    assert not caplog.records
    if words:
        with pytest.raises(ConfigError, match=words):
            refuse_long(model, [3, 9], 16)
    else:
        refuse_long(model, [3, 9], 16)
        assert "come to 25 tokens" in caplog.text


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a model that was fetched from the hub once, on a machine that is cut off now."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "models--acme--small" / "refs").mkdir(parents=True)
    (tmp_path / "models--acme--small" / "refs" / "main").write_text("0" * 40)
    snapshot = tmp_path / "models--acme--small" / "snapshots" / ("0" * 40)
    shutil.copytree(BASE, snapshot)
    is_cut_off.cache_clear()
    yield snapshot
    is_cut_off.cache_clear()


def test_a_model_in_the_cache_needs_no_network(hub: Path) -> None:
    (hub / "generation_config.json").unlink()
    model = Model("acme/small")
    assert (model.generation, model.eos_ids) == ({}, {2}), "an optional file that is not there is none"
    refuse_unfit(model)
    assert entries("acme/small").keys() == entries(BASE).keys()
    (hub / "model.safetensors").write_text(POINTER)
    with pytest.raises(ConfigError, match="git-lfs"):
        refuse_unfit(model)
    (hub / "model.safetensors").unlink()
    assert entries("acme/small") == {}, "the trainer fetches them"


@pytest.mark.parametrize("name", ["acme/other", "./nowhere", "/no/such/folder", "no such model"])
def test_a_model_that_is_nowhere(hub: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"no folder|cannot be had from the hub") as caught:
        Model(name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("status", "words"), [(404, "no such model"), (401, "no such model"), (403, "gated"), (0, "")])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path: Path, status: int, words: str) -> None:
    """A server on this machine in place of the hub; with status 0 none."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("X-Error-Code", "GatedRepo" if status == 403 else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        if status:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        is_cut_off.cache_clear()
        try:
            with pytest.raises(ConfigError, match=words or "cannot be had from the hub now"):
                Model("acme/small")
        finally:
            is_cut_off.cache_clear()
            if status:
                server.shutdown()
    assert len(asked) <= 2


def test_an_unreadable_file_is_one_sentence(folder: Path) -> None:
    assert find(folder, "absent.json") is None
    assert read(folder, "absent.json") is None
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        Model(str(folder))
