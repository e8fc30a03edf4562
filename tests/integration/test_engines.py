"""A validator's engines: one for each arithmetic that audits ask for, as far as there is room."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from farflung.engine.local import LocalEngine  # noqa: E402
from farflung.net.node_stats import NodeStats  # noqa: E402
from farflung.weights import engines  # noqa: E402
from farflung.weights.engines import Engines  # noqa: E402


@pytest.fixture
def make(tiny_qwen, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[Engines, list[torch.dtype]]]:
    """Engines of a tiny model on a device with so much free memory, and the types in which one was built."""

    def make(free: int) -> tuple[Engines, list[torch.dtype]]:
        built: list[torch.dtype] = []

        def build(dtype: torch.dtype) -> LocalEngine:
            built.append(dtype)
            return LocalEngine(tiny_qwen().to(dtype))

        monkeypatch.setattr(engines, "free_bytes", lambda device: free)
        config = tiny_qwen().config.to_json_string().encode()
        versions = SimpleNamespace(known=lambda digest: SimpleNamespace(step=7))
        return Engines(build, config, torch.device("cpu"), versions, "float32", NodeStats()), built

    return make


def test_a_second_engine_is_made_when_it_is_first_asked_for_and_kept(make) -> None:
    found, built = make(1 << 30)
    assert built == [torch.float32]
    arithmetic, half = found.loaded_in(("bfloat16", "float32"))
    assert (arithmetic, half.engine.model.dtype, built) == ("bfloat16", torch.bfloat16, [torch.float32, torch.bfloat16])
    assert found.loaded_in(("float32", "bfloat16"))[0] == "float32"
    assert found.loaded_in(("bfloat16",))[1] is half
    assert len(built) == 2


def test_without_room_an_engine_that_is_there_serves_where_the_profile_was_verified_in_it(make) -> None:
    found, built = make(1000)
    assert found.loaded_in(("bfloat16", "float32"))[0] == "float32"
    assert built == [torch.float32]


def test_without_room_and_without_another_choice_the_engine_that_is_there_makes_room(make) -> None:
    found, built = make(1000)
    assert found.loaded_in(("bfloat16",))[0] == "bfloat16"
    assert found.loaded_in(("bfloat16", "float32"))[0] == "bfloat16"
    assert found.loaded_in(("float32",))[0] == "float32"
    assert built == [torch.float32, torch.bfloat16, torch.float32]


def test_one_engine_tells_which_step_it_holds(make) -> None:
    found, _ = make(1 << 30)
    stats = found._stats
    for arithmetic, step in (("bfloat16", -1), ("float32", 7)):
        _, loaded = found.loaded_in((arithmetic,))
        loaded._count_as("digest", 7)
        assert stats.loaded_step == step
    found.invalidate()
    assert stats.loaded_step == -1
    assert not loaded.has("digest")
