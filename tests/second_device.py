"""A second device for machines that have none: tensors on `far:0` are computed on the CPU but may not meet its tensors.

Wrapper tensors on torch's device for others (PrivateUse1), with autograd. What CUDA refuses is refused: operations on
tensors of two devices (but for scalars and indices of the CPU), `.numpy()`, and generators of the CPU.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

FAR = "far:0"
MEET = {
    f"aten::{name}"
    for name in ("_to_copy", "copy_", "index.Tensor", "index", "index_put", "index_put_", "_index_put_impl_", "set_")
}
"""Operations that may take tensors of both devices: copies, and an index from the CPU."""
calls: Counter[str] = Counter()
"""Operations on the device, by name; `sync` counts those that wait for a value of it."""


class Far(torch.Tensor):
    """A tensor on the second device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Far":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=torch.device(FAR),
            storage_offset=inner.storage_offset(),
            layout=inner.layout,
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.inner!r})"

    def tolist(self) -> Any:
        calls["sync"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    name = func._schema.name
    far = [one for one in flat if isinstance(one, Far)]
    near = [one for one in flat if isinstance(one, torch.Tensor) and not isinstance(one, Far)]
    if far and name not in MEET and any(one.dim() for one in near):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found far:0 and cpu ({name})")
    if far and name == "aten::index" and not isinstance(args[0], Far):
        raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({name})")
    kinds = {one.type for one in flat if isinstance(one, torch.device)}
    back = {id(one.inner): one for one in far}
    out = func(*_near(flat, spec)[0], **_near(flat, spec)[1])
    if "cpu" in kinds and "far" not in kinds:
        return out
    calls["sync" if name == "aten::_local_scalar_dense" else name] += bool(far) or "far" in kinds
    is_far = isinstance(args[0], Far) if name == "aten::copy_" else bool(far) or "far" in kinds
    return tree_map(lambda one: _wrapped(one, back), out) if is_far else out


def _near(flat: list[Any], spec: Any) -> tuple[Any, Any]:
    def near(one: Any) -> Any:
        if isinstance(one, Far):
            return one.inner
        return torch.device("cpu") if isinstance(one, torch.device) and one.type == "far" else one

    return tree_unflatten([near(one) for one in flat], spec)


def _wrapped(one: Any, back: dict[int, Far]) -> Any:
    if not isinstance(one, torch.Tensor) or isinstance(one, Far):
        return one
    return back[id(one)] if id(one) in back else Far(one)


class _Everywhere(TorchDispatchMode):
    """New tensors go where they are asked to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[str]:
    """Have the device for as long as this lasts; gives its name."""
    made = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:  # copies below all modes
        found = made(data, *args, **kwargs)
        return found if device is None else found.to(device)

    torch.tensor = tensor
    try:
        with _Everywhere():
            yield FAR
    finally:
        torch.tensor = made


def moved(model: Any, device: str) -> Any:
    """A model on a device, in place; tied weights are tied again, for tensors of another class cannot move in place."""
    model.to(device)
    model.tie_weights()
    return model


def _register() -> None:
    if torch._C._get_privateuse1_backend_name() == "far":
        return
    _setup_privateuseone_for_python_backend("far")
    module: Any = torch.get_device_module("far")
    fields: dict[str, Any] = {
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: True,
        "set_device": lambda *_: None,
    }
    for name, value in fields.items():
        try:
            setattr(module, name, value)
        except AttributeError:
            setattr(type(module), name, staticmethod(value))
    _autocast()


LIBRARIES: list[torch.library.Library] = []


def _autocast() -> None:
    """Products are taken in the type of the autocast, all else as it comes, as on CUDA."""
    every = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    every.fallback(torch.library.fallthrough_kernel)
    products = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in ("linear", "matmul", "mm", "bmm", "addmm", "scaled_dot_product_attention"):
        products.impl(name, partial(_lowered, getattr(torch.ops.aten, name)))
    LIBRARIES.extend((every, products))  # they hold for as long as they live


def _lowered(operation: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype("far")

    def low(one: Any) -> Any:
        return one.to(dtype) if isinstance(one, torch.Tensor) and one.dtype == torch.float32 else one

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return operation(*tree_map(low, args), **tree_map(low, kwargs))


_register()  # as it is imported: what torch has a queue for is settled by the first backward pass of a process
