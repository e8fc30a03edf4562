"""Engine, replay and learner on a second device that refuses what CUDA refuses: the same answers as on the CPU."""

import copy
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from farflung.engine import plain, replay  # noqa: E402
from farflung.engine.base import Request  # noqa: E402
from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.learner.loss import Objective  # noqa: E402
from farflung.learner.optimise import Learner, Optimisation  # noqa: E402
from farflung.learner.pack import Rollout, Segment, pack  # noqa: E402
from farflung.learner.policy import Policy  # noqa: E402
from farflung.numerics import devices  # noqa: E402
from farflung.protocol.errors import ConfigError  # noqa: E402
from farflung.protocol.probe import Slice  # noqa: E402
from farflung.protocol.stops import DONE, Stops  # noqa: E402
from farflung.redteam import other_weights, picks  # noqa: E402
from farflung.redteam.adversary import Cheating  # noqa: E402
from second_device import DEVICES, FAR, calls  # noqa: E402


@pytest.fixture
def far() -> str:
    return FAR


def requests(count: int) -> list[Request]:
    prompts = [tuple((7 * i + 3 * k) % 30 + 2 for k in range(3 + i % 3)) for i in range(count)]
    temperatures = itertools.cycle([1.0, 0.0, 0.7])
    return [Request(prompt, 2**40 + i, t, 24) for i, (prompt, t) in enumerate(zip(prompts, temperatures, strict=False))]


REFUSED = {
    "a sum of both": lambda far: far + torch.ones(3),
    "a choice of both": lambda far: torch.where(far > 0, far, torch.zeros(3)),
    "a result on the CPU": lambda far: torch.add(far, far, out=torch.empty(3)),
    "both joined": lambda far: torch.cat([far, torch.ones(3)]),
    "both stacked": lambda far: torch.stack([far[0], torch.tensor(1.0)]),
    "a mask of the device for the CPU": lambda far: torch.ones(3)[far > 0],
    "values of the CPU under a mask": lambda far: far.index_put_([far > 0], torch.ones(3)),
    "weights of the CPU": lambda far: torch.nn.Linear(3, 3)(far),
    "numpy": lambda far: far.numpy(),
    "numpy by another name": lambda far: np.asarray(far),
    "a tensor of a list of its values": lambda far: torch.tensor([far[0], far[1]]),
    "a generator of the CPU": lambda far: torch.randn(3, device=far.device, generator=torch.Generator()),
    "a generator of the CPU, in place": lambda far: far.normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("place", DEVICES[1:])
def test_a_device_refuses(place: str, what: str) -> None:
    """As CUDA does, and there is CUDA itself where a machine has it."""
    if (place, what) == ("cuda", "a tensor of a list of its values"):
        return  # it fetches each, and waits for each
    there = torch.ones(3, device=place)
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](there)
    assert there.cpu().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("place", DEVICES[1:])
def test_a_device_allows(place: str) -> None:
    """Scalars and indices of the CPU, copies that are asked for, random numbers of its own."""
    there, here = torch.arange(3.0, device=place), torch.zeros(3)
    assert (there + torch.tensor(1.0)).cpu().tolist() == [1.0, 2.0, 3.0]
    assert there[torch.tensor([2, 0])].tolist() == there[[2, 0]].tolist() == [2.0, 0.0]
    here[1:] = there[1:]
    assert here.tolist() == there.cpu().tolist() == [0.0, 1.0, 2.0]
    state = torch.get_rng_state()
    drawn = torch.randn(3, device=place)
    assert torch.equal(torch.get_rng_state(), state), "what is drawn there is not drawn here"
    torch.manual_seed(1)
    assert not torch.equal(torch.randn(3, device=place), drawn)
    first = torch.randn(3, device=place)
    torch.manual_seed(1)
    torch.randn(3, device=place)
    assert torch.equal(torch.randn(3, device=place), first)


def test_waits_for_the_device_are_counted(far) -> None:
    there = torch.ones(3, device=far)
    waits = [lambda: bool(there[0] > 0), there.tolist, there.cpu, lambda: torch.equal(there, there), there.nonzero]
    for wait in waits:
        before = calls["sync"]
        wait()
        assert calls["sync"] == before + 1


def test_an_engine_says_and_replays_the_same_there(tiny_qwen, far) -> None:
    moves = np.zeros((2, 32), np.uint8)
    moves[0, 4:12], moves[1, 4:12] = 1, DONE
    here = LocalEngine(tiny_qwen(), eos_ids=[1], stops=Stops(moves))
    there = LocalEngine(copy.deepcopy(here.model).to(far), eos_ids=[1], stops=Stops(moves), max_rows=5)
    asked = requests(12)
    expected, said = here.generate(asked), there.generate(asked)
    assert [one.ids for one in said] == [one.ids for one in expected]
    items = [(request, one.ids) for request, one in zip(asked, said, strict=True)]
    for one, other in zip(there.replay(items), here.replay(items), strict=True):
        for name in ("gap", "margin", "pick", "lead", "logp"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-5)
    name = next(name for name, tensor in here.model.state_dict().items() if tensor.numel() > 40)
    assert there.values([Slice(name, 8, 16)]) == here.values([Slice(name, 8, 16)])


def test_a_decoding_step_waits_for_the_device_only_to_say_its_tokens(tiny_qwen, far) -> None:
    model = tiny_qwen().eval().to(far)
    asked = [replace(one, temperature=1.0) for one in requests(6)]
    with torch.inference_mode():
        plain.decode(model, asked, frozenset(), slots=6)
        before = calls["sync"]
        plain.decode(model, [replace(one, max_new_tokens=48) for one in asked], frozenset(), slots=6)
    assert calls["sync"] - before <= 48 * 2 + 1, "one copy a token, and transformers asks whether a mask hides anything"


FREE = re.findall(
    r"\w+",
    "slice select view unsqueeze expand alias detach unbind permute transpose t as_strided split _unsafe_view squeeze "
    "reshape empty empty_strided new_empty empty_like lift_fresh empty_permuted",
)


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked to do; views and empty tensors cost it nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.removeprefix("aten::") not in FREE
        return func(*args, **(kwargs or {}))


VOCAB = 151_936


@pytest.mark.parametrize("rows", [64, 256])
def test_a_decoding_step_is_few_launches_however_many_rows(rows: int) -> None:
    logits = torch.empty(rows, VOCAB, device="meta", dtype=torch.bfloat16)
    asked = [Request((1,), row, 0.7, 8) for row in range(rows)]
    with Launches() as seen:
        plain.pick(logits, asked, 5)
    assert seen.count <= 60


@pytest.mark.parametrize("tokens", [1000, 4000])
def test_a_replay_is_few_launches_however_many_tokens(tokens: int) -> None:
    at_once = devices.blocks("meta").scores // VOCAB
    logits = torch.empty(min(tokens, at_once), VOCAB, device="meta", dtype=torch.bfloat16)
    count, zeros = len(logits), np.zeros(len(logits), np.uint64)
    with Launches() as seen:
        replay.compare(
            logits, torch.zeros(count, dtype=torch.long, device="meta"), zeros, np.arange(count), np.ones(count)
        )
    assert seen.count * -(-1000 // at_once) <= 3000


@pytest.mark.parametrize("setting", ["cuda:7", "xpu", "tpu", "mps"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{setting}'"):
        devices.pick(setting)


def test_a_device_that_torch_was_given_is_taken(far) -> None:
    assert devices.pick("far") == devices.pick("far", 0) == devices.pick(far) == torch.device(far)
    with pytest.raises(ConfigError, match="of far this machine has 1, counted from 0"):
        devices.pick("far:1")
    assert devices.blocks(far) == devices.blocks("cuda")


@pytest.mark.parametrize("attack", [picks.Greedy, other_weights.OneLayer])
def test_an_adversary_cheats_where_its_engine_is(tiny_qwen, far, attack) -> None:
    asked, said = requests(4), []
    for place in ("cpu", far):
        engine = Cheating(LocalEngine(tiny_qwen().to(place), eos_ids=[1]), attack())
        engine.load((name, tensor) for name, tensor in tiny_qwen().named_parameters())
        said.append([one.ids for one in engine.generate(asked)])
        assert said[-1] != [one.ids for one in engine.truth.generate(asked)]
    assert said[0] == said[1]


def test_auto_takes_the_best_there_is_and_says_what_it_leaves(monkeypatch, caplog) -> None:
    assert devices.pick("auto") == torch.device(devices.best())
    assert devices.pick("cpu") == torch.device("cpu")
    monkeypatch.setattr(devices, "present", lambda: ["cpu", "cuda:0", "cuda:1"])
    with caplog.at_level("INFO"):
        devices.say("worker", torch.device("cpu"), "cpu")
    assert "worker leaves cuda:0 and cuda:1 unused because=worker.device is 'cpu'" in caplog.text


@pytest.mark.parametrize("how", ["float32", "bfloat16", "lora", "kl", "stale, checkpointed"])
def test_a_learner_takes_the_same_steps_there(tiny_qwen, far, how: str) -> None:
    here, there = (learner_of(copy.deepcopy(tiny_qwen()), device, how) for device in ("cpu", far))
    batch = [rollout(k) for k in range(12)]
    behaviour = [torch.full(micro.mask_BT.shape, -3.0) for micro in pack(batch, 64)] if "stale" in how else None
    for _ in range(2):
        expected, found = (learner.step(pack(batch, 64), behaviour) for learner in (here, there))
        assert found.loss == pytest.approx(expected.loss, abs=1e-5 if how != "bfloat16" else 2e-3)
        assert found.importance == pytest.approx(expected.importance, abs=1e-4)
        assert found.mismatch_kl == pytest.approx(expected.mismatch_kl, abs=1e-4 if how != "bfloat16" else 0.1)
    other = dict(there.policy.tensors())
    for name, tensor in here.policy.tensors():
        found = other[name].cpu().float()
        near = (found - tensor.float()).abs() <= 0.01 * tensor.float().abs() + 1e-5
        assert near.float().mean() > (0.98 if how == "bfloat16" else 0.999), name


def learner_of(model, device: str, how: str) -> Learner:
    torch.manual_seed(1)
    base = copy.deepcopy(model).to(device)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    options = {"compute_dtype": dtype, "is_dithered": True, "lora_rank": 4 * (how == "lora")}
    policy = Policy(model.to(device), is_checkpointed="checkpointed" in how, **options)
    reference = Policy(base, compute_dtype=dtype) if how == "kl" else None
    objective = Objective(kl=0.1 if how == "kl" else 0.0)
    return Learner(policy, Optimisation(lr=1e-3, objective=objective), reference=reference)


def rollout(k: int) -> Rollout:
    rng = np.random.default_rng(k)
    prompt, said = (tuple(map(int, rng.integers(2, 32, size))) for size in (4 + k % 3, 5 + k % 5))
    return Rollout((Segment("prompt", prompt), Segment("model", said)), float(rng.normal()), 1.0, (-2.0,) * len(said))
