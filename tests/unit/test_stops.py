"""Stop strings: the table over tokens says what the text says, in every kind of tokenizer; bad tables and settings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from farflung.config import Config
from farflung.protocol.errors import ConfigError, Malformed
from farflung.protocol.stops import DONE, Stops, until
from farflung.tasks.stop_table import stops_of


class Named:
    """As much of a model as the table asks for."""

    def __init__(self, tokenizer: Tokenizer, unused: int = 3) -> None:
        self.path, self.tokenizer, self.vocab = "m", tokenizer, tokenizer.get_vocab_size() + unused
        self.whole = [token for token in range(self.vocab) if "\ufffd" not in tokenizer.decode([token])]
        """Without parts of a sign: what stands around one may show as parts too."""


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: signs that stand for bytes, pieces of several of them."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ċ" + "Ċ", "aĊ", "Us", "er", "ĠUs", ":Ċ", "bUser:Ċc", "Ã©"]
    merges = [("Ċ", "Ċ"), ("a", "Ċ"), ("U", "s"), ("e", "r"), ("Ġ", "Us"), (":", "Ċ"), ("Ã", "©")]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2 and Gemma have it: ▁ for a space, and tokens of one byte each for what else there is."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcUsern:é", "▁a", "Us", "▁Us", "er", ":▁", "▁▁"]
    merges = [("▁", "a"), ("U", "s"), ("▁", "Us"), ("e", "r"), ("▁", "▁"), (":", "▁")]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS = {"byte level": Named(byte_level()), "metaspace": Named(metaspace())}
STOPS = {
    "line": ("\n",),
    "blank line": ("\n\n",),
    "overlapping": ("aab", "ab\n", "User:"),
    "inside another": (" User:\n", "er"),
    "repeating": ("aabaaa",),
}
TABLES = {(kind, name): stops_of(KINDS[kind], strings) for kind in KINDS for name, strings in STOPS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOPS)
@given(data=st.data())
def test_a_rollout_ends_with_the_token_that_completes_a_stop_string_in_its_text(kind, name, data) -> None:
    model, strings = KINDS[kind], STOPS[name]
    likely = [token for one in strings for token in model.tokenizer.encode("a" + one).ids]
    token = st.sampled_from(likely) | st.sampled_from(model.whole)
    # a letter in front: some decoders drop the space that a text begins with
    ids = [*model.tokenizer.encode("c").ids, *data.draw(st.lists(token, max_size=24))]
    texts = [model.tokenizer.decode(ids[:count], skip_special_tokens=False) for count in range(len(ids) + 1)]
    expected = next((n for n, text in enumerate(texts) if any(one in text for one in strings)), 0)
    assert TABLES[kind, name].end(ids) == expected


def test_what_is_scored_stands_before_the_first_stop_string() -> None:
    assert until("42\nUser: more", ["User:", "\n"]) == "42"
    assert until("no end", ["\n"]) == until("no end", []) == "no end"


def test_a_table_of_single_signs_has_one_state_and_names_the_tokens_that_end_at_once() -> None:
    model = KINDS["byte level"]
    stops = stops_of(model, ["\n"])
    shown = {token for token in range(model.vocab) if "\n" in model.tokenizer.decode([token])}
    assert len(stops.moves_SV) == 1
    assert set(stops.at_once()) == shown
    assert len(shown) == 5


def test_it_travels_as_a_file_and_a_bad_one_is_refused() -> None:
    stops = TABLES["byte level", "overlapping"]
    vocab = KINDS["byte level"].vocab
    assert np.array_equal(Stops.unpack(stops.pack(), vocab).moves_SV, stops.moves_SV)
    states = len(stops.moves_SV)
    for bad in (b"", stops.pack()[:-1], bytes([states]) + stops.pack()[1:], bytes([DONE - 1]) + stops.pack()[1:]):
        with pytest.raises(Malformed, match="stop strings"):
            Stops.unpack(bad, vocab)
    with pytest.raises(Malformed, match="multiples"):
        Stops.unpack(bytes(vocab * 129), vocab)


@pytest.mark.parametrize("stop", [["\N{SNOWMAN}"], ["é", "\ufffd"]])
def test_a_string_that_tokens_cut_through_or_never_show_is_refused(stop) -> None:
    with pytest.raises(ConfigError, match=r"generate\.stop has .*choose a string"):
        stops_of(KINDS["byte level"], stop)


def test_a_string_beyond_ascii_works_where_one_token_has_it() -> None:
    model = KINDS["byte level"]
    assert stops_of(model, ["é"]).end(model.tokenizer.encode("caféa").ids) == 4


@pytest.mark.parametrize("stop", [[""], ["x" * 33], ["\N{SNOWMAN}" * 11], list("abcde")])
def test_settings_that_are_too_much(stop) -> None:
    with pytest.raises(ValueError, match="at most 4 strings of 1 to 32 bytes"):
        Config.model_validate({"generate": {"stop": stop}})


def test_no_stop_strings_no_table() -> None:
    assert stops_of(KINDS["metaspace"], []) is None
