"""Models made in several threads at once leave nothing of theirs in the process."""

import sys
import threading

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from farflung.engine.config_check import metered  # noqa: E402
from farflung.engine.loading import build  # noqa: E402

PATCHED = (
    *((torch.nn.init, name) for name in ("normal_", "uniform_", "zeros_", "ones_", "kaiming_uniform_")),
    *((transformers.PreTrainedModel, name) for name in ("init_weights", "tie_weights")),
)
"""What transformers replaces while it makes a model."""


@pytest.fixture
def put_back():
    """What the process has, whatever a failing test leaves."""
    switches, dtype = sys.getswitchinterval(), torch.get_default_dtype()
    before = [getattr(where, name) for where, name in PATCHED]
    yield before
    sys.setswitchinterval(switches)
    torch.set_default_dtype(dtype)
    for (where, name), one in zip(PATCHED, before, strict=True):
        setattr(where, name, one)


def test_models_made_at_once_leave_the_process_as_it_was(tiny_qwen, put_back) -> None:
    config = tiny_qwen().config.to_json_string(use_diff=False).encode()
    sys.setswitchinterval(1e-5)
    threads = [
        threading.Thread(target=lambda dtype=dtype: [build(config, dtype) for _ in range(5)])
        for dtype in (torch.float32, torch.bfloat16) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [getattr(where, name) for where, name in PATCHED] == put_back
    assert torch.get_default_dtype() == torch.float32


def test_tensors_are_counted_for_one_model_at_a_time() -> None:
    """The hooks that count are the whole process's: one that came while another thread calls them broke its model."""
    has_begun = threading.Event()

    def count() -> None:
        with metered(1e9):
            has_begun.set()

    other = threading.Thread(target=count)
    with metered(1e9):
        other.start()
        assert not has_begun.wait(0.2)
    assert has_begun.wait(10)
    other.join()
