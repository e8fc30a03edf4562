"""A second device for machines that have none: tensors on `far:0` are computed on the CPU but may not meet its tensors.

Wrapper tensors on torch's device for others (PrivateUse1), with autograd, in every thread. What CUDA refuses is
refused: operations on tensors of two devices (but for scalars and indices of the CPU), `.numpy()`, generators of the
CPU, and tensors of the CPU made of a list of the device's. It has random numbers of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

FAR = "far:0"
COPIES = {f"aten::{name}" for name in ("_to_copy", "copy_", "set_", "_has_compatible_shallow_copy_type")}
"""Operations that may take tensors of both devices."""
INDEXED = {f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_")}
"""Operations whose second argument, the indices, may be the CPU's."""
SYNCS = {f"aten::{name}" for name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select")}
"""Operations that wait for a value of the device."""
calls: Counter[str] = Counter()
"""Operations on the device, by name; `sync` counts those that wait for it, copies to the CPU among them."""
RANDOM = torch.Generator()
"""The device's own random numbers: what is drawn there changes no state of the CPU."""


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

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # so that a module moves in place and ties stay
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], *_: Any) -> "Far":
        return Far(parts["inner"])

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {FAR} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        calls["sync"] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    name, flat = func._schema.name, [*_each(args), *_each(kwargs.values())]
    far = [one for one in flat if type(one) is Far]
    kinds = {one.type for one in flat if type(one) is torch.device}
    if far and name not in COPIES:
        _refuse_mixed(name, args, flat)
    is_far = type(args[0]) is Far if name == "aten::copy_" else "far" in kinds or (bool(far) and "cpu" not in kinds)
    if is_far and torch.Tag.nondeterministic_seeded in func.tags:
        kwargs = _with_own_numbers(func, flat, kwargs)
    calls[name] += is_far
    calls["sync"] += name in SYNCS or (bool(far) and not is_far)
    out = func(*_mapped(_near, args), **dict(zip(kwargs, _mapped(_near, kwargs.values()), strict=True)))
    return _wrapped(out, {id(one.inner): one for one in far}) if is_far else out


def _refuse_mixed(name: str, args: Any, flat: list[Any]) -> None:
    """Scalars of the CPU may come as such, not in a list of tensors."""
    indices: set[int] = set()
    if name in INDEXED:
        if type(args[0]) is not Far and any(type(one) is Far for one in args[1]):
            raise RuntimeError(f"indices should be either on cpu or on the same device as the indexed tensor ({name})")
        indices = {id(one) for one in args[1]}
    near = [one for one in flat if isinstance(one, torch.Tensor) and type(one) is not Far and id(one) not in indices]
    listed = {id(one) for several in args if isinstance(several, list | tuple) for one in several} if near else ()
    if any(one.dim() or id(one) in listed for one in near):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {FAR} and cpu ({name})")


def _with_own_numbers(func: Any, flat: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    if any(isinstance(one, torch.Generator) for one in flat):
        raise RuntimeError(f"Expected a 'far' device type for generator but found 'cpu' ({func})")
    takes_one = any(argument.name == "generator" for argument in func._schema.arguments)
    return kwargs | ({"generator": RANDOM} if takes_one else {})


def _each(values: Iterable[Any]) -> Iterator[Any]:
    """The values, and those of lists among them."""
    for one in values:
        if isinstance(one, list | tuple):
            yield from one
        else:
            yield one


def _mapped(change: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    return [[change(part) for part in one] if isinstance(one, list | tuple) else change(one) for one in values]


def _near(one: Any) -> Any:
    if type(one) is Far:
        return one.inner
    return torch.device("cpu") if type(one) is torch.device and one.type == "far" else one


def _wrapped(out: Any, back: dict[int, Far]) -> Any:
    if isinstance(out, list | tuple):
        return type(out)(_wrapped(one, back) for one in out)
    if not isinstance(out, torch.Tensor) or type(out) is Far:
        return out
    if id(out) in back:
        return back[id(out)]
    if torch.is_inference_mode_enabled() and not out.is_inference():  # a view, which is what its base is
        with torch.inference_mode(False):
            return Far(out)
    return Far(out)


DEVICES = ["cpu", FAR, *(["cuda"] if torch.cuda.is_available() else [])]
"""Where tests run that ask for a `device`."""


def _register() -> None:
    if torch._C._get_privateuse1_backend_name() == "far":
        return
    _setup_privateuseone_for_python_backend("far")
    module: Any = torch.get_device_module("far")
    fields: dict[str, Any] = {
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "set_device": lambda *_: None,
        "get_rng_state": lambda *_: RANDOM.get_state(),
        "set_rng_state": lambda state, *_: RANDOM.set_state(state),
        "manual_seed_all": RANDOM.manual_seed,
    }
    for name, value in fields.items():
        setattr(module, name, value)
    here = torch.library.Library("_", "IMPL", "PrivateUse1")
    here.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs))  # what is made there of nothing
    copying = torch.library.Library("aten", "IMPL", "PrivateUse1")  # lists of numbers are copied below all dispatch
    copying.impl("copy_", lambda *args, **kwargs: _run(torch.ops.aten.copy_.default, args, kwargs))
    LIBRARIES.extend((here, copying))
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
        return operation(*map(low, args), **kwargs)


_register()  # as it is imported: what torch has a queue for is settled by the first backward pass of a process
