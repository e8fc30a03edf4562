"""The local engine against its own definition: cache, padding, batching and replay change nothing but rounding."""

import copy
import itertools
import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from farflung.engine import noise, plain  # noqa: E402
from farflung.engine import replay as replay_module  # noqa: E402
from farflung.engine.base import Completion, Request  # noqa: E402
from farflung.engine.cpu import attention  # noqa: E402
from farflung.engine.cpu import decode as decode_module  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.engine.ways import attends_plainly  # noqa: E402
from farflung.protocol.errors import ConfigError, WeightsError  # noqa: E402
from farflung.protocol.stops import DONE, Stops  # noqa: E402
from second_device import DEVICES  # noqa: E402

NEAR_TIE = 1e-3
"""Scores of float32 models closer than this may change places by rounding."""


def requests(count: int, *, max_new_tokens: int = 24, temperature: float = 1.0) -> list[Request]:
    """Prompts of three lengths, each with its own seed."""
    return [
        Request(tuple((7 * i + 3 * k) % 30 + 2 for k in range(3 + i % 3)), 2**40 + i, temperature, max_new_tokens)
        for i in range(count)
    ]


def by_definition(model, request: Request, eos: frozenset[int]) -> list[int]:
    """Gumbel-max with whole forward passes, no cache, no padding, numpy's noise."""
    ids = list(request.prompt_ids)
    for position in range(request.first_position, request.first_position + request.max_new_tokens):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1].float().numpy()
        if request.temperature > 0:
            scores = scores / request.temperature
            scores = scores + noise.gumbel_numpy(noise.bits_numpy([request.seed], position, len(scores)))[0]
        ids.append(int(scores.argmax()))
        if ids[-1] in eos:
            break
    return ids[len(request.prompt_ids) :]


def margins(engine: LocalEngine, asked: list[Request], said: list[Completion]) -> np.ndarray:
    replays = engine.replay([(request, completion.ids) for request, completion in zip(asked, said, strict=True)])
    return np.concatenate([replay.margin for replay in replays])


def other_families() -> dict[str, object]:
    small = {"vocab_size": 32, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.2}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    }
    return {
        "llama-untied": transformers.LlamaConfig(**small, **llama, tie_word_embeddings=False),
        "mistral-sliding": transformers.MistralConfig(**small, **llama, sliding_window=6),
        "gpt2-absolute-positions": transformers.GPT2Config(**small, n_embd=32, n_layer=2, n_head=2, n_positions=256),
        "gemma2-softcapped-head": transformers.Gemma2Config(
            **small, **llama, head_dim=16, sliding_window=8, attn_logit_softcapping=None, final_logit_softcapping=5.0
        ),
    }


def test_a_mixed_batch_says_what_the_definition_says(tiny_qwen, device) -> None:
    model = tiny_qwen().eval()
    engine = LocalEngine(tiny_qwen().to(device))
    asked = [
        Request(r.prompt_ids, r.seed, temperature, max_new_tokens)
        for r, temperature, max_new_tokens in zip(
            requests(12), itertools.cycle([1.0, 0.0, 0.7]), itertools.cycle([20, 5, 1, 12]), strict=False
        )
    ]
    said = engine.generate(asked)
    assert [list(completion.ids) for completion in said] == [by_definition(model, r, engine.eos_ids) for r in asked]
    for request, completion in zip(asked, said, strict=True):
        assert len(completion.ids) == request.max_new_tokens or completion.ids[-1] in engine.eos_ids


FAMILIES = ("llama-untied", "mistral-sliding", "gpt2-absolute-positions", "gemma2-softcapped-head")


@pytest.mark.parametrize(
    ("family", "place"), [*((name, "cpu") for name in FAMILIES), *itertools.product(FAMILIES[1:3], DEVICES[1:])]
)
def test_other_families_of_models(family: str, place: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(other_families()[family]).eval()
    engine = LocalEngine(copy.deepcopy(model).to(place), eos_ids=[1])
    asked = requests(5, max_new_tokens=16)
    said = engine.generate(asked)
    assert [list(completion.ids) for completion in said] == [by_definition(model, r, engine.eos_ids) for r in asked]
    assert margins(engine, asked, said).max() < NEAR_TIE


def test_the_plain_loop_says_what_the_decoder_for_cpus_says(tiny_qwen) -> None:
    moves = np.zeros((2, 32), np.uint8)
    moves[0, 4:12], moves[1, 4:12] = 1, DONE
    engine = LocalEngine(tiny_qwen(), eos_ids=[1], stops=Stops(moves))
    temperatures = itertools.cycle([1.0, 0.0, 0.7])
    asked = [replace(one, temperature=t) for one, t in zip(requests(24), temperatures, strict=False)]
    expected = engine.generate(asked)
    for slots, batching in ((64, "padded"), (5, "padded"), (5, "level"), (1, "whole")):
        with torch.inference_mode():
            said = plain.decode(engine.model, asked, engine.eos_ids, None, slots, batching, engine.stops)
        assert [one.ids for one in said] == [one.ids for one in expected]
        for one, other in zip(said, expected, strict=True):
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-4)
    left = iter([False] * 3)
    some = plain.decode(engine.model, asked, engine.eos_ids, lambda: next(left, True))
    assert all(one is None or one.ids == whole.ids for one, whole in zip(some, expected, strict=True))
    assert None in some


def test_alone_and_in_a_batch_the_same_tokens(tiny_qwen, device) -> None:
    engine = LocalEngine(tiny_qwen().to(device), eos_ids=[])
    asked = requests(8, max_new_tokens=40 if device == "cpu" else 5)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked]
    if [c.ids for c in together] != [c.ids for c in alone]:
        assert margins(engine, asked, alone).max() < NEAR_TIE
    narrow = LocalEngine(engine.model, eos_ids=[], max_rows=3).generate(asked)
    assert [c.ids for c in narrow] == [c.ids for c in together]


def test_a_row_ends_with_the_token_that_completes_a_stop_string_and_nobody_else_does(tiny_qwen, device) -> None:
    moves = np.zeros((2, 32), np.uint8)
    moves[0, 4:12], moves[1, 4:12], moves[:, 20] = 1, DONE, DONE  # two of eight in a row, or one
    stops, asked = Stops(moves), requests(24, max_new_tokens=40)
    free = LocalEngine(tiny_qwen().to(device), eos_ids=[1])
    kept = LocalEngine(free.model, eos_ids=[1], stops=stops, max_rows=5)
    whole = [one.ids for one in free.generate(asked)]
    said = kept.generate(asked)
    assert [one.ids for one in said] == [ids[: stops.end(ids) or None] for ids in whole]
    ends = [stops.end(ids) for ids in whole]
    assert len({end for end in ends if end}) > 3
    assert any(not end for end in ends) or any(ids[-1] == 1 for ids in whole)
    assert margins(kept, asked, said).max() < NEAR_TIE


def test_a_group_that_shares_its_prompt_says_what_its_members_say_alone(tiny_qwen, device) -> None:
    model = tiny_qwen().eval()
    engine = LocalEngine(tiny_qwen().to(device))
    asked = [Request((3, 4, 5), seed, 1.0, 12) for seed in range(6)] + [Request((6, 7), 6, 1.0, 12)]
    said = engine.generate(asked)
    assert len({completion.ids for completion in said}) > 3
    assert [list(completion.ids) for completion in said] == [by_definition(model, r, engine.eos_ids) for r in asked]


def crowd() -> list[Request]:
    """Groups of five with long prompts, whose members end at different times."""
    prompts = [tuple((7 * g + 3 * k * k) % 30 + 2 for k in range(length)) for g, length in enumerate((100, 97, 100))]
    heats = (1.0, 0.0, 0.7)
    return [Request(prompts[i % 3], 2**41 + i, heats[i % 5 % 3], 2 + 3 * i % 17) for i in range(15)]


@pytest.mark.parametrize(
    ("family", "is_shared"),
    [("llama-untied", True), ("mistral-sliding", False), ("gpt2-absolute-positions", True), ("qwen", True),
     ("gemma2-softcapped-head", False)],
)  # fmt: skip
def test_attention_in_two_parts_says_what_the_definition_says(family: str, is_shared: bool, tiny_qwen) -> None:
    torch.manual_seed(1)
    families = other_families()
    model = tiny_qwen() if family == "qwen" else transformers.AutoModelForCausalLM.from_config(families[family])
    model = model.eval()
    engine, attention = LocalEngine(model), model.config._attn_implementation
    assert attends_plainly(model) is is_shared
    said = engine.generate(crowd())
    assert [list(completion.ids) for completion in said] == [by_definition(model, r, engine.eos_ids) for r in crowd()]
    assert model.config._attn_implementation == attention, "left as it was"


def stream(*, is_long: bool) -> list[Request]:
    """Groups of four or five with prompts of many lengths, whose members end after one to thirty tokens."""
    lengths = (97, 110, 101, 99, 104) if is_long else (3, 19, 4, 11, 6, 28, 5, 8)
    prompts = [tuple((7 * g + 3 * k * k) % 30 + 2 for k in range(length)) for g, length in enumerate(lengths)]
    heats = (1.0, 0.0, 0.7)
    return [
        Request(prompts[i % len(prompts)], 2**41 + i, heats[i % 7 % 3], 1 + 11 * i % 30)
        for i in range((3 if is_long else 4) * len(prompts))
    ]


class Watched(decode_module.DecodeBatch):
    """Rows that remember how many there were, and how many columns were kept for them."""

    seen: ClassVar[list[tuple[int, int]]] = []

    def advance(self, token_B) -> None:
        super().advance(token_B)
        self.seen.append((len(self), self._cache.layers.layers[0].keys.shape[2]))


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("family", ["qwen", "gpt2-absolute-positions", "mistral-sliding"])
def test_rows_that_join_say_what_the_definition_says(family, is_long, tiny_qwen, monkeypatch) -> None:
    torch.manual_seed(2)
    model = tiny_qwen() if family == "qwen" else transformers.AutoModelForCausalLM.from_config(other_families()[family])
    engine, asked = LocalEngine(model.eval()), stream(is_long=is_long)
    expected = [by_definition(model, request, engine.eos_ids) for request in asked]
    assert [list(completion.ids) for completion in engine.generate(asked)] == expected
    monkeypatch.setattr(decode_module, "DecodeBatch", Watched)
    for slots in (2, 5):
        engine.max_rows = slots
        Watched.seen.clear()
        said = engine.generate(asked)
        if [list(completion.ids) for completion in said] != expected:
            assert margins(engine, asked, said).max() < NEAR_TIE
        rows, columns = zip(*Watched.seen, strict=True)
        assert max(rows) <= slots
        assert max(columns) <= 110 + 30, "columns of rows that left are forgotten"
        if family != "mistral-sliding":
            busy = rows[: -max(request.max_new_tokens for request in asked)]
            assert sum(busy) >= 0.8 * slots * len(busy) > 0, "no slot waits for the longest row"


@pytest.mark.parametrize("slots", [2, 5])
def test_a_prompt_that_is_shared_is_there_for_those_that_join_later(slots: int, tiny_qwen, monkeypatch) -> None:
    read: list[tuple[int, ...]] = []

    class Noted(decode_module.DecodeBatch):
        def _read(self, prompts):
            read.extend(prompts)
            return super()._read(prompts)

    engine, asked = LocalEngine(tiny_qwen()), stream(is_long=True)
    expected = [by_definition(engine.model, request, engine.eos_ids) for request in asked]
    engine.generate(crowd())
    monkeypatch.setattr(decode_module, "DecodeBatch", Noted)
    engine.max_rows = slots
    assert [list(completion.ids) for completion in engine.generate(asked)] == expected
    assert sorted(read) == sorted({request.prompt_ids for request in asked}), "each prompt once"


@pytest.mark.parametrize("is_long", [False, True])
def test_plain_attention_in_bfloat16_says_nearly_what_replay_says(is_long: bool, tiny_qwen) -> None:
    model = tiny_qwen().eval().bfloat16()
    engine, asked = LocalEngine(model), stream(is_long=is_long)
    assert attends_plainly(model)
    found = margins(engine, asked, engine.generate(asked))
    assert np.quantile(found, 0.9) < NEAR_TIE, "most tokens are the verifier's own"
    assert found.max() < 0.2, "the others are nearly ties"


def test_attention_in_two_parts_is_what_ran(tiny_qwen, monkeypatch) -> None:
    seen = []
    attend = attention._attend

    def counted(*parts, **options):
        seen.append(len(parts[1]))
        return attend(*parts, **options)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, attention._NAME, counted)
    LocalEngine(tiny_qwen().eval()).generate(crowd())
    assert max(seen) == 15
    assert min(seen) < 15, "fewer as some end"


def test_a_model_that_bends_attention_shares_no_prompts(tiny_qwen, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_BENDS", ("scale_of_nothing", "position_ids"))
    assert not attends_plainly(tiny_qwen().eval())


def test_logp_is_that_of_the_sampling_temperature(tiny_qwen, device) -> None:
    model = tiny_qwen().eval()
    request = Request((3, 4, 5), 11, 0.5, 6)
    (said,) = LocalEngine(tiny_qwen().to(device), eos_ids=[]).generate([request])
    with torch.no_grad():
        logits = model(torch.tensor([request.prompt_ids + said.ids])).logits[0, 2:-1]
    expected = (logits / 0.5).log_softmax(-1)[range(6), list(said.ids)]
    assert torch.allclose(torch.tensor(said.logp), expected, atol=1e-4)


def test_honest_work_replays_without_margin_and_unseeded_work_does_not(tiny_qwen, device) -> None:
    engine = LocalEngine(tiny_qwen().to(device), eos_ids=[])
    asked = requests(16, max_new_tokens=32 if device == "cpu" else 8)
    honest = engine.generate(asked)
    assert margins(engine, asked, honest).max() < NEAR_TIE
    unseeded = engine.generate([Request(r.prompt_ids, r.seed + 1, r.temperature, r.max_new_tokens) for r in asked])
    assert (margins(engine, asked, unseeded) > NEAR_TIE).mean() > 0.3
    other = LocalEngine(tiny_qwen(seed=1).to(device), eos_ids=[])
    assert (margins(other, asked, honest) > NEAR_TIE).mean() > 0.3


def test_replay_finds_the_logp_that_generation_gave(tiny_qwen, device) -> None:
    engine = LocalEngine(tiny_qwen().to(device))
    asked = [Request((3, 5 + i, 8), i, 0.7, 9) for i in range(5)]
    done = engine.generate(asked)
    replays = engine.replay([(request, item.ids) for request, item in zip(asked, done, strict=True)])
    for item, replay in zip(done, replays, strict=True):
        assert replay.logp == pytest.approx(np.array(item.logp), abs=1e-4)


def test_greedy_replay_needs_no_noise(tiny_qwen, device) -> None:
    engine = LocalEngine(tiny_qwen().to(device), eos_ids=[])
    asked = requests(3, temperature=0.0)
    assert margins(engine, asked, engine.generate(asked)).max() < NEAR_TIE


def test_gap_and_margin_by_hand(tiny_qwen, device) -> None:
    model = tiny_qwen().eval()
    request, sent = Request((2, 3), 5, 0.8, 9), (7, 8)
    (replay,) = LocalEngine(tiny_qwen().to(device)).replay([(request, sent)])
    with torch.no_grad():
        logits = model(torch.tensor([[2, 3, 7]])).logits[0, 1:]
    scores = (logits / 0.8 + noise.gumbel([5, 5], [1, 2], 32)).numpy()
    ranked = np.sort(scores, axis=1)
    np.testing.assert_allclose(replay.gap, ranked[:, -1] - ranked[:, -2], atol=1e-4)
    np.testing.assert_allclose(replay.margin, ranked[:, -1] - scores[range(2), list(sent)], atol=1e-4)
    assert replay.gap.dtype == replay.margin.dtype == np.float32


def test_scores_are_float32_even_where_logits_are_bfloat16(device) -> None:
    request, sent = Request((2,), 5, 0.7, 9), (7, 8, 9)
    logits = (torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 8).bfloat16()
    gap, margin, pick, lead, logp = replay_module._compare(logits.to(device), [(request, sent)], [3])
    scores = (logits.float() / 0.7 + noise.gumbel([5] * 3, [0, 1, 2], 32)).numpy()
    np.testing.assert_allclose(margin, scores.max(axis=1) - scores[range(3), list(sent)], atol=1e-5)
    assert (gap >= 0).all()
    chance = torch.softmax(logits.float() / 0.7, dim=1).numpy()
    np.testing.assert_allclose(pick, chance[range(3), scores.argmax(axis=1)], rtol=1e-5)
    np.testing.assert_allclose(np.exp(logp), chance[range(3), list(sent)], rtol=1e-5)
    first, second = scores.argsort(axis=1)[:, -1], scores.argsort(axis=1)[:, -2]
    np.testing.assert_allclose(np.exp(lead), chance[range(3), second] / chance[range(3), first], rtol=1e-4)


def test_replay_does_not_depend_on_its_chunks_and_takes_empty_rows(tiny_qwen, device) -> None:
    model = tiny_qwen().to(device)
    asked = requests(9, max_new_tokens=15)
    items = [(request, tuple(range(2, 2 + k))) for k, request in enumerate(asked)]
    wide = LocalEngine(model).replay(items)
    narrow = LocalEngine(model, replay_tokens=20).replay(items)
    assert [len(replay.gap) for replay in wide] == list(range(9))
    for one, other in zip(wide, narrow, strict=True):
        np.testing.assert_allclose(one.margin, other.margin, atol=1e-4)


def test_replay_refuses_ids_that_the_model_does_not_have(tiny_qwen, device) -> None:
    with pytest.raises(ValueError, match="item 0"):
        LocalEngine(tiny_qwen().to(device)).replay([(requests(1)[0], (3, 32))])


def test_stopping_early_gives_only_what_is_complete(tiny_qwen, device) -> None:
    engine = LocalEngine(tiny_qwen().to(device), eos_ids=[])
    asked = [Request((3, 4), 1, 1.0, 3), Request((3, 4, 5), 2, 1.0, 50), Request((5,), 3, 1.0, 5)]
    ticks = itertools.count()
    said = engine.generate(asked, should_stop=lambda: next(ticks) >= 10)
    assert [completion and len(completion.ids) for completion in said] == [3, None, 5]
    assert engine.generate(asked, should_stop=lambda: True) == [None, None, None]


def test_a_request_without_prompt_or_budget_is_refused(tiny_qwen, device) -> None:
    engine = LocalEngine(tiny_qwen().to(device))
    for request in (Request((), 1, 1.0, 5), Request((3,), 1, 1.0, 0)):
        with pytest.raises(ValueError, match="request 0"):
            engine.generate([request])
    assert engine.generate([]) == []


def test_end_tokens_come_from_the_configuration(tiny_qwen, device) -> None:
    assert LocalEngine(tiny_qwen().to(device)).eos_ids == {1}
    assert LocalEngine(tiny_qwen(eos_token_id=[1, 5]).to(device)).eos_ids == {1, 5}
    assert LocalEngine(tiny_qwen().to(device), eos_ids=[9]).eos_ids == {9}


def test_an_engine_built_from_its_configuration_speaks_like_the_original(tiny_qwen, device, tmp_path) -> None:
    model = tiny_qwen()
    model.config.save_pretrained(tmp_path)
    asked = requests(4)
    expected = LocalEngine(model).generate(asked)
    for source in (tmp_path, (tmp_path / "config.json").read_bytes()):
        engine = LocalEngine.from_folder(source, device=device)
        with pytest.raises(WeightsError, match="no complete weights"):
            engine.generate(asked)
        engine.load(model.state_dict().items())
        assert [c.ids for c in engine.generate(asked)] == [c.ids for c in expected]


def test_tied_weights_may_come_once_or_twice(tiny_qwen, device) -> None:
    tensors = dict(tiny_qwen(seed=3).state_dict())
    assert tensors["lm_head.weight"].data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    engine = LocalEngine(tiny_qwen().to(device))
    for absent in ("lm_head.weight", "model.embed_tokens.weight", ""):
        engine.load((name, tensor) for name, tensor in tensors.items() if name != absent)
        assert torch.equal(engine.model.lm_head.weight.cpu(), tensors["lm_head.weight"])
    with pytest.raises(WeightsError, match="differs"):
        engine.load((tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}).items())


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda pairs: pairs[:-1], "missing"),
        (lambda pairs: [*pairs, pairs[0]], "twice"),
        (lambda pairs: [*pairs, ("stranger", pairs[0][1])], "unknown"),
        (lambda pairs: [(pairs[0][0], pairs[0][1][:-1]), *pairs[1:]], "shape"),
        (lambda pairs: [(pairs[0][0], pairs[0][1].long()), *pairs[1:]], "type"),
    ],
    ids=["missing", "twice", "unknown", "shape", "type"],
)
def test_weights_that_do_not_fit_are_refused_and_the_engine_stops(tiny_qwen, device, spoil, complaint: str) -> None:
    engine = LocalEngine(tiny_qwen().to(device))
    pairs = [(name, tensor.clone()) for name, tensor in engine.model.state_dict().items() if name != "lm_head.weight"]
    with pytest.raises(WeightsError, match=complaint):
        engine.load(spoil(pairs))
    with pytest.raises(WeightsError, match="no complete weights"):
        engine.replay([])
    engine.load(pairs)
    assert engine.replay([(requests(1)[0], (3, 4))])


@pytest.mark.parametrize(
    "config", [b"not json", b"[]", b"{}", json.dumps({"model_type": "no-such-model"}).encode(), "/no/such/folder"]
)
def test_a_configuration_that_describes_no_model_is_refused(config) -> None:
    with pytest.raises(ConfigError):
        LocalEngine.from_folder(config)


def test_a_configuration_cannot_ask_for_code_or_quantisation(tiny_qwen) -> None:
    fields = tiny_qwen().config.to_dict()
    fields["auto_map"] = {"AutoModelForCausalLM": "stranger/code--evil.Model"}
    fields["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    engine = LocalEngine.from_folder(json.dumps(fields).encode(), dtype=torch.bfloat16)
    assert type(engine.model).__module__.startswith("transformers.")
    assert engine.model.lm_head.weight.dtype == torch.bfloat16
