"""The canonical quantisers: fixed bits, those of GGUF where it has them, each coarser than the one before."""

import hashlib

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from farflung.numerics.quantise import is_quantised, quantise, quantised

KINDS = ("int8", "fp8", "int4")


def made(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    """Weights from integers alone, so that no library's chance matters."""
    values = (np.arange(rows * columns, dtype=np.uint64) * 2654435761 + seed * 97) % 2**32
    return torch.from_numpy((values.astype(np.float64) / 2**31 - 1).astype(np.float32)).view(rows, columns).bfloat16()


VECTORS = {
    "int8": "e98d1e64c3940363",
    "fp8": "3c2d55ba2e5275c7",
    "int4": "4c9ed1a3f050d694",
}


@pytest.mark.parametrize("kind", KINDS)
def test_vectors(kind: str) -> None:
    found = quantise(made(), kind)
    assert found.dtype == torch.bfloat16
    assert hashlib.sha256(found.view(torch.int16).numpy().tobytes()).hexdigest()[:16] == VECTORS[kind]


def test_int4_is_q4_0() -> None:
    quants = pytest.importorskip("gguf.quants")
    weight = made(64, 256, 3)
    there = quants.Q4_0.dequantize_blocks(quants.Q4_0.quantize_blocks(weight.float().numpy().reshape(-1, 32)))
    assert torch.equal(quantise(weight, "int4"), torch.from_numpy(there.astype(np.float32)).bfloat16().view(64, 256))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_done_twice_as_once_but_for_the_scale(kind: str) -> None:
    once = quantise(made(), kind)
    assert float((quantise(once, kind).float() - once.float()).abs().max()) < 0.01 * float(once.abs().max())


def test_each_has_fewer_bits_than_the_one_before() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    off = [float((quantise(weight, kind).float() - weight.float()).pow(2).mean().sqrt()) for kind in KINDS]
    assert off[0] < off[1] / 1.5 < off[2] / 3
    assert off[2] < 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 7), (1, 32), (2, 33), (4, 3, 40)])
def test_any_shape_of_matrix_and_zeros(kind: str, shape: tuple[int, ...]) -> None:
    assert quantise(torch.ones(shape).bfloat16(), kind).shape == shape
    assert torch.equal(quantise(torch.zeros(shape).bfloat16(), kind), torch.zeros(shape).bfloat16())
    tiny = torch.full(shape, 1e-30).bfloat16()
    assert quantise(tiny, kind).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(kind: str) -> None:
    weight = made()
    assert torch.equal(quantise(weight, kind)[5:9], quantise(weight[5:9], kind))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = made()
    weight[2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        quantise(weight, "int8")


def test_matrices_alone_are_taken() -> None:
    named = {
        "model.embed_tokens.weight": made(),
        "lm_head.weight": made(),
        "norm.weight": made()[0],
        "q.weight": made(),
    }
    found = dict(quantised(named.items(), "int8"))
    assert [name for name, tensor in named.items() if is_quantised(name, tensor)] == ["q.weight"]
    assert all(torch.equal(found[name], named[name]) == (name != "q.weight") for name in named)
    assert all(one is other for (_, one), other in zip(quantised(named.items(), ""), named.values(), strict=True))
