from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from farflung.envs.sums import Sums, worked

BASE = Path(__file__).parents[2] / "examples" / "base"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def test_the_base_model_reads_and_writes_sums_one_character_a_token(tokenizer):
    env = Sums()
    for task in islice(env.tasks("eval"), 50):
        for text in (env.prompt(task), worked(task["terms"])):
            ids = tokenizer.encode(text).ids
            assert len(ids) == len(text)
            assert tokenizer.token_to_id("<unk>") not in ids
            assert tokenizer.decode([*ids, tokenizer.token_to_id("<eos>")]) == text


def test_the_folder_is_small_and_whole():
    files = {file.name: file.stat().st_size for file in BASE.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) < 4e6
