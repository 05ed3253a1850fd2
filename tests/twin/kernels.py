"""Triton in its interpreter, and bitsandbytes' CUDA library with its CPU one behind it."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from tests.twin.card import STATE


def install(*, interpret_rope: bool = False) -> None:
    """Have every Triton kernel run in the interpreter; the rope kernel in torch, unless asked for.

    In the interpreter the rope kernel takes half of a run's time. `test_twin_long` compares both.
    """
    from triton.runtime import driver
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(self.fn, "__name__", "?")
        STATE.kernels[name] += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            if name == "_rope_embedding_QK" and not interpret_rope:
                return rope(*args, **kwargs)
            return _in_float32(launch, self, args, kwargs)

    GridExecutor.__call__ = call
    arch = int("".join(map(str, STATE.card.capability)))
    driver.set_active(_Driver(types.SimpleNamespace(backend="cuda", arch=arch, warp_size=32)))


def _in_float32(launch: Any, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Launch with bfloat16 tensors widened: the interpreter computes on their bits as integers."""
    wide: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def widened(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bfloat16:
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in wide:
            narrow = torch.empty(0, dtype=torch.bfloat16).set_(storage)
            wide[storage.data_ptr()] = (narrow, narrow.float())
        flat = wide[storage.data_ptr()][1]
        return flat.as_strided(value.size(), value.stride(), value.storage_offset())

    result = launch(
        kernel, *map(widened, args), **{name: widened(value) for name, value in kwargs.items()}
    )
    for narrow, computed in wide.values():
        narrow.copy_(computed)
    return result


class _Driver:
    """What Triton asks of the active driver."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {
                "max_shared_mem": 65_536,
                "multiprocessor_count": STATE.card.multiprocessors,
                "max_num_regs": 65_536,
                "warpSize": 32,
            }
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *args: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


def rope(q: Any, q_out: Any, k: Any, k_out: Any, *rest: Any, **constants: Any) -> None:
    """What Unsloth's `_rope_embedding_QK` computes: x cos + rotate_half(x) sin, -sin backwards.

    q, k: (batch, heads, tokens, head_dim), any strides; the results may be the inputs.
    `rest` has 16 strides, cos and its stride, sin and its stride, positions, tokens and the heads.
    """
    cos, sin, positions, tokens = rest[16], rest[18], rest[20], rest[21]
    half, batch = constants["half_head_dim"], q.shape[0]
    if constants["HAS_ROPE_INDICES"]:
        at = positions.reshape(-1)[: batch * tokens].long()
    else:
        at = torch.arange(tokens).repeat(batch)
    sign = -1.0 if constants["BACKWARD_PASS"] else 1.0
    c, s = (table[at, :half].view(batch, 1, tokens, half).float() for table in (cos, sin))
    pairs = [(q, q_out), (k, k_out)] if rest[23] else [(q, q_out)]
    for x, out in pairs:
        x0, x1 = x[..., :half].float(), x[..., half : 2 * half].float()
        out[..., :half].copy_(x0 * c - sign * x1 * s)
        out[..., half : 2 * half].copy_(x1 * c + sign * x0 * s)


# The 16 values of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0], dtype=np.float32,
)  # fmt: skip


def install_bitsandbytes() -> None:
    """Give bitsandbytes' library the CUDA functions that Unsloth calls through pointers."""
    import bitsandbytes.cextension as extension
    import bitsandbytes.functional as functional

    real = functional.lib
    extra: dict[str, Any] = {"cdequantize_blockwise_fp32": _dequantize_blockwise}
    for kind in ("fp16", "bf16", "fp32"):
        extra[f"cdequantize_blockwise_{kind}_nf4"] = _dequantize_nf4(kind)
    for kind in ("fp16", "bf16"):
        extra[f"cgemm_4bit_inference_naive_{kind}"] = _no_gemm

    class Library:
        def __getattr__(self, name: str) -> Any:
            return extra[name] if name in extra else getattr(real, name)

        def __getitem__(self, name: str) -> Any:
            return getattr(self, name)

    functional.lib = extension.lib = Library()


def _array(pointer: Any, count: int, dtype: Any) -> np.ndarray:
    address = getattr(pointer, "value", pointer)
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


def _number(value: Any) -> int:
    return int(getattr(value, "value", value))


def _dequantize_blockwise(
    code: Any, a: Any, absmax: Any, out: Any, blocksize: Any, n: Any, stream: Any = None
) -> None:
    count, block = _number(n), _number(blocksize)
    values, table = _array(a, count, np.uint8), _array(code, 256, np.float32)
    scale = _array(absmax, -(-count // block), np.float32)
    _array(out, count, np.float32)[:] = table[values] * np.repeat(scale, block)[:count]
    STATE.bitsandbytes["blockwise"] += 1


def _dequantize_nf4(kind: str) -> Any:
    def dequantize(
        code: Any, a: Any, absmax: Any, out: Any, blocksize: Any, n: Any, stream: Any = None
    ) -> None:
        count, block = _number(n), _number(blocksize)
        packed = _array(a, (count + 1) // 2, np.uint8)
        scale = _array(absmax, -(-count // block), np.float32)
        values = np.stack([NF4[packed >> 4], NF4[packed & 15]], axis=1).ravel()[:count]
        values = values * np.repeat(scale, block)[:count]
        if kind == "bf16":
            bits = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
            _array(out, count, np.uint16)[:] = bits.view(np.uint16)
        else:
            dtype = np.float16 if kind == "fp16" else np.float32
            _array(out, count, dtype)[:] = values.astype(dtype)
        STATE.bitsandbytes[f"nf4 {kind}"] += 1

    dequantize.restype = None  # type: ignore[attr-defined]
    return dequantize


def _no_gemm(*args: Any) -> None:
    raise NotImplementedError("the twin has no 4-bit matrix-vector product")


_dequantize_blockwise.restype = _no_gemm.restype = None  # type: ignore[attr-defined]
