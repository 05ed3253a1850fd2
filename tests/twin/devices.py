"""Tensors that say they are on `cuda:0`: CPU tensors whose storage carries a mark.

Two modes of torch see every operation. The function mode answers what Python asks (`.device`,
`.to("cuda")`, factories with a device) and reports operations that are given tensors of both
kinds. The dispatch mode sees what autograd and C++ do, so that gradients carry the mark too.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.twin.card import LEDGER, STATE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]
IS_CPU = torch.Tensor.is_cpu.__get__  # type: ignore[attr-defined]
TO, TYPE = torch.Tensor.to, torch.Tensor.type

# Operations that may see both kinds on a real card too, and those whose result is no tensor of it.
MAY_MIX = {
    "copy_", "__setitem__", "__getitem__", "__get__", "__set__", "index_put_", "set_data", "to",
    "_grad", "backward", "equal", "save", "__setstate__", "_make_subclass",
    "_make_wrapper_subclass", "_has_compatible_shallow_copy_type",
}  # fmt: skip
NO_TENSOR = {"__get__", "size", "stride", "numel", "shape", "storage_offset"}


def is_cuda(device: Any) -> bool:
    """Whether `device` (a torch.device, a name or an index) names a GPU."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str) and device.startswith("cuda")


def _kind(tensor: torch.Tensor) -> str:
    return torch._C.TensorBase.device.__get__(tensor).type  # type: ignore[attr-defined]


def _storage(tensor: torch.Tensor) -> Any:
    """The storage of a tensor; None for a subclass that has none (a quantised wrapper, say)."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return torch._C.TensorBase.untyped_storage(tensor)
    except (NotImplementedError, RuntimeError):
        return None


def tag(tensor: torch.Tensor) -> None:
    """Put the tensor's storage "on the card"."""
    storage = _storage(tensor)
    if storage is not None and not getattr(storage, "on_twin", False):
        storage.on_twin = True
        LEDGER.add(storage)


def tagged(tensor: torch.Tensor) -> bool:
    """Whether the tensor is "on the card"."""
    return _kind(tensor) == "cpu" and bool(getattr(_storage(tensor), "on_twin", False))


def _tag_all(result: Any, depth: int = 0) -> None:
    if isinstance(result, torch.Tensor):
        if _kind(result) == "cpu":
            tag(result)
    elif isinstance(result, list | tuple) and depth < 3:
        for item in result:
            _tag_all(item, depth + 1)


def _tensors(value: Any, depth: int = 0) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list | tuple) or depth > 3:
        return []
    return [tensor for item in value for tensor in _tensors(item, depth + 1)]


def _copied(tensor: torch.Tensor, to_card: bool) -> torch.Tensor:
    """The tensor on the other kind of memory: always a copy, as on a machine with a card."""
    if _kind(tensor) == "meta" or tagged(tensor) == to_card:
        return tensor
    with torch._C.DisableTorchFunction():
        copy = tensor.clone()
    if to_card:
        tag(copy)
    else:
        _untag(copy)
    return copy


def _untag(tensor: torch.Tensor) -> None:
    storage = _storage(tensor)
    if storage is not None and getattr(storage, "on_twin", False):
        storage.on_twin = False
        from torch.multiprocessing.reductions import StorageWeakRef

        LEDGER.alive.pop(StorageWeakRef(storage).cdata, None)


def _moved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """`Tensor.to` in all its forms."""
    tensor, rest, kwargs = args[0], list(args[1:]), dict(kwargs)
    kwargs.pop("non_blocking", None)
    to_card = None
    if rest and isinstance(rest[0], torch.Tensor):
        to_card = tagged(rest[0])
    elif rest and (is_cuda(rest[0]) or isinstance(rest[0], str | torch.device)):
        to_card = is_cuda(rest[0])
        rest[0] = CPU if to_card else rest[0]
        if len(rest) >= 3:
            rest[2] = False  # non_blocking
    if kwargs.get("device") is not None:
        to_card = is_cuda(kwargs["device"])
        kwargs["device"] = CPU if to_card else kwargs["device"]
    before = tagged(tensor)
    result = TO(tensor, *rest, **kwargs)
    if _kind(result) != "cpu":
        return result
    if to_card is None or to_card == before:
        if before:
            tag(result)
        return result
    if result is tensor or result.data_ptr() == tensor.data_ptr():
        result = tensor.clone()
    (tag if to_card else _untag)(result)
    return result


def _where() -> str:
    """The last three places of the call that are neither torch's nor the twin's."""
    frame, chain = sys._getframe(2), []
    while frame is not None and len(chain) < 3:
        name = frame.f_code.co_filename
        if "/twin/" not in name and "/torch/" not in name:
            chain.append(f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(chain)


def _note_mixing(name: str, tensors: list[torch.Tensor]) -> None:
    kinds = {tagged(t) for t in tensors if t.dim() and t.numel()}
    if len(kinds) == 2 and name not in MAY_MIX:
        STATE.mixed[f"{name}: {_where()}"] += 1


class FunctionMode(TorchFunctionMode):
    """What Python asks of tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ANSWERS:
            return _ANSWERS[func](args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "_parse_to":
            return func(*args, **kwargs)
        if func is TYPE and len(args) > 1 and isinstance(args[1], str) and "cuda" in args[1]:
            return _copied(TYPE(args[0], args[1].replace("cuda.", "")), True)
        asked = kwargs.get("device")
        on_card = None if asked is None else is_cuda(asked)
        if on_card:
            kwargs = {**kwargs, "device": CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        args = tuple(CPU if isinstance(a, torch.device) and a.type == "cuda" else a for a in args)
        if on_card is not None:
            result = func(*args, **kwargs)
            if on_card:
                _tag_all(result)
            return result
        tensors = _tensors(args) + _tensors(kwargs)
        if len(tensors) > 1:
            _note_mixing(name, tensors)
        follows = name not in NO_TENSOR and any(tagged(t) for t in tensors)
        result = func(*args, **kwargs)
        if follows:
            _tag_all(result)
        return result


class DispatchMode(TorchDispatchMode):
    """What autograd and C++ do."""

    supports_higher_order_operators = True  # flex_attention

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(tagged(t) for t in _tensors(args) + _tensors(kwargs)):
            _tag_all(result)
        return result


def _device(args: Any, kwargs: Any) -> torch.device:
    device = DEVICE(args[0])
    return CUDA if device.type == "cpu" and tagged(args[0]) else device


def _numpy(args: Any, kwargs: Any) -> Any:
    if tagged(args[0]):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first. [twin]"
        )
    return _NUMPY(*args, **kwargs)


def _new_device(args: Any, kwargs: Any) -> torch.device:
    if args and isinstance(args[0], int) and not isinstance(args[0], bool):
        return torch.device("cuda", args[0])
    return torch.device(*args, **kwargs)


_NUMPY = torch.Tensor.numpy
_ANSWERS: dict[Any, Any] = {
    DEVICE: _device,
    IS_CUDA: lambda args, kwargs: tagged(args[0]),
    IS_CPU: lambda args, kwargs: IS_CPU(args[0]) and not tagged(args[0]),
    torch.Tensor.get_device: lambda args, kwargs: 0 if tagged(args[0]) else -1,
    torch.Tensor.cuda: lambda args, kwargs: _copied(args[0], True),
    torch.Tensor.cpu: lambda args, kwargs: _copied(args[0], False),
    torch.Tensor.pin_memory: lambda args, kwargs: args[0],
    torch.Tensor.is_pinned: lambda args, kwargs: False,
    torch.Tensor.numpy: _numpy,
    TO: lambda args, kwargs: _moved(args, kwargs),
    torch.device: _new_device,
}


def install() -> None:
    """Enter both modes for the rest of the process, in every thread that begins from now on."""
    FunctionMode().__enter__()
    DispatchMode().__enter__()
    original = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def inner(self: threading.Thread) -> None:
        with FunctionMode(), DispatchMode():
            original(self)

    threading.Thread._bootstrap_inner = inner  # type: ignore[attr-defined]
