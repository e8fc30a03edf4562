"""The line that says why a run's differences are large."""

from farflung.protocol.messages import VersionView
from farflung.queries.versions import why_large


def view(delta_bytes: int) -> VersionView:
    return VersionView(
        step=1, manifest="0" * 64, full_bytes=1000, anchor_bytes=0, delta_bytes=delta_bytes, nodes=0, published_at=0.0
    )


def test_a_large_learning_rate_is_named_as_the_cause() -> None:
    assert "a step of 0.0003 shows in every bfloat16 weight below about 0.077" in why_large(3e-4, [view(250)])


def test_small_differences_and_none_need_no_word() -> None:
    assert why_large(1e-6, [view(5), view(250)]) == ""
    assert why_large(1e-6, [view(0)]) == ""
