"""Models of many kinds: generation, replay and the learner say what a plain pass says, or the model is refused."""

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from farflung.engine import local, noise, ways  # noqa: E402
from farflung.engine.base import Completion, Request  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.engine.ways import SLOWEST, Ways  # noqa: E402
from farflung.learner import forward  # noqa: E402
from farflung.learner.forward import Kind  # noqa: E402
from farflung.learner.pack import Rollout, Segment, pack  # noqa: E402
from farflung.learner.policy import Policy  # noqa: E402
from farflung.numerics import trying  # noqa: E402
from farflung.numerics.trying import steady_tokens  # noqa: E402
from farflung.protocol.errors import ConfigError  # noqa: E402
from farflung.rollouts.agreement import agree  # noqa: E402
from second_device import DEVICES  # noqa: E402

torch.set_num_threads(1)
VOCAB, NEAR = 32, 1e-3
SMALL = {
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256}
ROPE = {"rope_theta": 10000.0}
STATE = {
    "head_dim": 8,
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SSM = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MODELS: dict[str, tuple[str, dict]] = {
    "plain": ("Llama", HEADS),
    "yarn": ("Llama", HEADS | {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}}),
    "window": ("Mistral", HEADS | {"sliding_window": 8}),
    "windows in some layers": (
        "Qwen3",
        HEADS | {"head_dim": 8, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "gemma 3": ("Gemma3Text", HEADS | {"head_dim": 8, "sliding_window": 8}),
    "gemma 2 caps": ("Gemma2", HEADS | {"head_dim": 8, "sliding_window": 8}),
    "olmo 3": ("Olmo3", HEADS | {"sliding_window": 8}),
    "sinks": ("GptOss", HEADS | {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "absolute places": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "alibi": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "no mask of ours": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "experts": ("Mixtral", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "latent attention": (
        "DeepseekV3",
        HEADS
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "state": ("Qwen3_5Text", HEADS | STATE),
    "state and experts": ("Qwen3Next", HEADS | STATE | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "state beside attention": ("FalconH1", HEADS | SSM | {"head_dim": 8, "mamba_chunk_size": 8}),
    "state alone": ("Mamba", {"state_size": 8}),
    "state in chunks": (
        "Mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    ),
}
SHARING = {"plain", "yarn", "absolute places", "experts", "latent attention"}
"""Models whose completions of one prompt may stand in one row."""


def model_of(name: str, **changes):
    torch.manual_seed(0)
    kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL | fields | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def asked() -> list[Request]:
    """Groups of three with prompts of three lengths, one far shorter than the others."""
    draw = np.random.default_rng(0)
    prompts = [tuple(int(token) for token in draw.integers(3, VOCAB, length)) for length in (24, 21, 4)]
    return [
        Request(prompt, 100 + 7 * i + j, (1.0, 0.7)[j % 2], 12) for i, prompt in enumerate(prompts) for j in range(3)
    ]


@torch.no_grad()
def plain(model, request: Request, ids) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of each token by one pass over all, and how far its score is below the best."""
    fed = torch.tensor([[*request.prompt_ids, *ids[:-1]]], device=model.device)
    logits = model(fed, use_cache=False).logits[0, len(request.prompt_ids) - 1 :].cpu()
    policy = logits / request.temperature
    places = range(request.first_position, request.first_position + len(ids))
    scores = policy + noise.gumbel([request.seed] * len(ids), places, VOCAB)
    token = torch.tensor(ids)[:, None]
    return policy.log_softmax(-1).gather(1, token)[:, 0].numpy(), (
        scores.amax(1) - scores.gather(1, token)[:, 0]
    ).numpy()


def rollouts_of(requests: list[Request], said: list[Completion]) -> list[Rollout]:
    return [
        Rollout((Segment("prompt", request.prompt_ids), Segment("model", one.ids)), 1.0, request.temperature)
        for request, one in zip(requests, said, strict=True)
    ]


def check(engine: LocalEngine, policy: Policy | None = None) -> None:
    """Everything that computes with a model against plain passes over each text."""
    requests = asked()
    said = engine.generate(requests)
    expected = [plain(engine.model, request, one.ids) for request, one in zip(requests, said, strict=True)]
    replays = engine.replay([(request, one.ids) for request, one in zip(requests, said, strict=True)])
    for one, replay, (logp, margin) in zip(said, replays, expected, strict=True):
        assert margin.max() < NEAR, "generation"
        assert replay.margin.max() < NEAR, "replay"
        np.testing.assert_allclose(one.logp, logp, atol=NEAR)
        np.testing.assert_allclose(replay.logp, logp, atol=NEAR)
    policy = policy or Policy(engine.model)
    for micro in pack(rollouts_of(requests, said), 4096, is_shared=policy.can_share):
        found = policy.logp_BT(micro).detach().cpu()
        for row, index in enumerate(micro.index):
            np.testing.assert_allclose(found[row, : len(said[index].ids)], expected[index][0], atol=NEAR)


@pytest.mark.parametrize("name", MODELS)
def test_all_who_compute_with_a_model_agree(name: str) -> None:
    model = model_of(name)
    engine = LocalEngine(model, eos_ids=[2])
    assert (engine.ways.reading == "shared") is (name in SHARING)
    assert engine.ways.batching != "whole", "a cache that holds is taken"
    check(engine)
    assert "decoding=" in str(agree(engine))


@pytest.mark.parametrize("name", MODELS)
def test_the_plain_loop_of_other_devices_agrees_too(name: str, monkeypatch) -> None:
    for module in (local, ways):
        monkeypatch.setattr(module, "is_for_cpu", lambda *_: False)
    engine = LocalEngine(model_of(name), eos_ids=[2], max_rows=3)
    assert engine.ways.batching != "whole", "a cache that holds is taken"
    check(engine)


@pytest.mark.parametrize("name", ["plain", "window"])
@pytest.mark.parametrize("place", DEVICES[1:])
def test_all_who_compute_with_a_model_agree_elsewhere(name: str, place: str) -> None:
    engine = LocalEngine(model_of(name).to(place), eos_ids=[2])
    check(engine)
    assert "decoding=whole" not in str(agree(engine))


def test_a_plain_model_keeps_every_fast_way() -> None:
    model = model_of("plain")
    assert LocalEngine(model).ways == Ways(is_plain=True, batching="padded", reading="shared", most_tokens=None)
    assert forward.find_kind(model) == Kind(has_linear_head=True, can_share=True, can_pad=True)


@pytest.mark.parametrize("name", ["plain", "state"])
@pytest.mark.parametrize("batching", ["level", "alone", "whole"])
def test_each_way_to_decode_that_may_be_fallen_back_to(name: str, batching: str) -> None:
    engine = LocalEngine(model_of(name), eos_ids=[2])
    engine._ways = SLOWEST._replace(batching=batching)
    engine.max_rows = 2
    check(engine)


def test_what_does_not_hold_is_not_taken(monkeypatch) -> None:
    """Each way is refused in turn, down to the plain one."""
    model, refused = model_of("plain"), []
    monkeypatch.setattr(ways, "attends_plainly", lambda *_: False)
    for name, tried in (("_decodes", "batching"), ("_reads", "reading")):
        monkeypatch.setattr(ways, name, lambda _, way, tried=tried: refused.append((tried, way)))
    assert ways.find_ways(model) == SLOWEST
    assert refused == [("batching", way) for way in ("padded", "level", "alone")] + [
        ("reading", way) for way in ("shared", "padded")
    ]
    monkeypatch.setattr(trying, "Trial", lambda _: (_ for _ in ()).throw(RuntimeError("takes no text")))
    assert ways.find_ways(model) == SLOWEST


@pytest.mark.parametrize("has_linear_head", [True, False])
@pytest.mark.parametrize("name", ["plain", "state"])
def test_the_learner_without_shared_prompts_and_without_padding(name: str, has_linear_head: bool) -> None:
    model = model_of(name)
    for can_pad in (True, False):
        policy = Policy(model)
        policy._kind = Kind(has_linear_head, can_share=False, can_pad=can_pad)
        check(LocalEngine(model, eos_ids=[2]), policy)


def test_a_learner_that_holds_in_no_way_takes_row_by_row(monkeypatch) -> None:
    monkeypatch.setattr(forward, "_holds", lambda *_: False)
    assert forward.find_kind(model_of("plain")) == Kind(has_linear_head=True, can_share=False, can_pad=False)


def test_a_cap_that_small_weights_do_not_come_near_is_found() -> None:
    quiet = model_of("gemma 2 caps", initializer_range=1e-3)
    assert not forward.find_kind(quiet).has_linear_head


def test_weights_that_hide_a_window_do_not_have_it_ignored() -> None:
    quiet = model_of("window", initializer_range=1e-5)
    assert LocalEngine(quiet).ways.reading == "padded"
    assert not Policy(quiet).can_share


def test_dropout_stays_off_where_activations_are_checkpointed() -> None:
    fields = {"word_embed_proj_dim": 32, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 128}
    small = {name: value for name, value in SMALL.items() if name != "initializer_range"}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**small, **fields, init_std=0.2, dropout=0.5))
    requests, said = asked(), [Completion((3, 4, 5, 6), ())] * len(asked())
    (micro,) = pack(rollouts_of(requests, said), 4096, is_shared=False)
    expected = Policy(model).logp_BT(micro).detach()
    runs: list[int] = []
    policy = Policy(model, is_checkpointed=True)
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: runs.append(1))
    found = policy.logp_BT(micro)
    found.sum().backward()
    assert torch.allclose(found.detach(), expected, atol=1e-5)
    assert len(runs) == 2, "once forwards, once again backwards"


# --- models that are refused -----------------------------------------------------------------------------------------


def dynamic(most: int):
    return model_of(
        "plain", max_position_embeddings=most, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}
    )


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 40}
    torch.manual_seed(0)
    rope = ROPE | {"rope_type": "longrope"} | factors
    return transformers.AutoModelForCausalLM.from_config(
        transformers.Phi3Config(**SMALL, **HEADS, rope_parameters=rope, original_max_position_embeddings=40)
    ).eval()


@pytest.mark.parametrize(("make", "most"), [(lambda: dynamic(40), 40), (longrope, 40)], ids=["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_is_taken_as_far_as_it_does_not(make: Callable, most: int) -> None:
    model = make()
    assert most - 1 <= steady_tokens(model) <= most
    engine = LocalEngine(model, eos_ids=[2])
    check(engine)
    assert most - 1 <= agree(engine).ways.most_tokens <= most
    with pytest.raises(ConfigError, match="depends on the length of a text beyond"):
        engine.generate([Request(tuple(range(3, 24)), 1, 1.0, 60)])


def test_rope_of_one_kind_for_every_length_is_no_limit() -> None:
    assert steady_tokens(model_of("yarn")) is None


def test_a_model_that_sees_what_follows_is_refused_in_one_sentence() -> None:
    torch.manual_seed(0)
    fields = {"num_attention_heads": 4, "intermediate_size": 48}
    both_ways = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, **fields))
    with pytest.raises(ConfigError, match=r"^with this model .* disagree by .* take another base model"):
        agree(LocalEngine(both_ways, eos_ids=[2]))


def test_a_model_that_changes_its_weights_as_it_runs_is_refused() -> None:
    model = model_of("plain")

    def rescale(*_: object) -> None:
        model.lm_head.weight.mul_(1.0)

    model.register_forward_hook(rescale)
    with pytest.raises(ConfigError, match="changes its own weights"):
        agree(LocalEngine(model, eos_ids=[2]))


def test_a_model_that_says_no_numbers_is_refused() -> None:
    model = model_of("plain")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ConfigError, match="disagree by nan"):
        agree(LocalEngine(model, eos_ids=[2]))
