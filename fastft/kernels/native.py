"""The compiled parts of a training step on the CPU: built once per machine, or plain torch where
that fails.

Each function below has a plain torch form, which says what it computes; `kernels.cpp` does the
same in one pass over memory, `products.cpp` (AVX512-BF16 or AMX) sums of matrix products, and
`attention.cpp` (the same) attention as a whole, whose torch form is in row_attention.py. The
library is built by the system's C++ compiler at first use (about five seconds) and kept in the
user's cache folder. `FASTFT_NATIVE=0` keeps torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp",
    "-shared", "-fPIC",
]  # fmt: skip
_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where they are switched off or cannot be built (see
    `why_not`).
    """
    return None if why_not() else ctypes.CDLL(str(_library_path()))


@functools.cache
def why_not() -> str:
    """Return why the compiled kernels are not used, or an empty string; builds them if need be."""
    if os.environ.get("FASTFT_NATIVE", "1") == "0":
        return "switched off by FASTFT_NATIVE=0"
    if sys.platform != "linux":
        return f"not tried on {sys.platform}"
    if _library_path().exists():
        return ""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler (g++) on this machine"
    return _build(compiler, _library_path())


def _build(compiler: str, target: Path) -> str:
    """Compile the sources into `target`; returns what went wrong, or an empty string."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            unfinished = Path(folder) / "kernels.so"
            command = [compiler, *_FLAGS, *map(str, _sources()), "-o", str(unfinished), *_openmp()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                return (
                    f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
            ctypes.CDLL(str(unfinished))  # fails here rather than in a step
            os.replace(unfinished, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the kernels could not be built: {error}"
    return ""


def _sources() -> list[Path]:
    return [
        Path(__file__).with_name(name) for name in ("kernels.cpp", "products.cpp", "attention.cpp")
    ]


def _library_path() -> Path:
    """Return where the library for this source, processor and torch lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastft"
    sources = [
        path.read_text(encoding="utf-8")
        for path in (*_sources(), Path(__file__).with_name("tiles.h"))
    ]
    identity = [*sources, *_FLAGS, *_openmp(), _processor()]
    return cache / f"kernels-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:16]}.so"


@functools.cache
def _processor() -> str:
    """Return what -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )


def _openmp() -> list[str]:
    """Return torch's own OpenMP library for the linker: a second one would keep a second set of
    threads.
    """
    root = Path(torch.__file__).parent
    return [
        str(path)
        for folder in (root / "lib", root.parent / "torch.libs")
        for path in folder.glob("libgomp*.so*")
    ][:1]


def usable(dtype: torch.dtype) -> bool:
    """Return whether the compiled kernels serve tensors of `dtype`."""
    return dtype in _SUFFIX and library() is not None


def _call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    """Call a kernel: tensors as pointers (contiguous), ints as int64, floats as float32; threads
    come last.
    """
    converted: list[object] = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous(), name
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif argument is None:
            converted.append(ctypes.c_void_p(None))
        elif isinstance(argument, bool):
            converted.append(ctypes.c_int(argument))
        elif isinstance(argument, int):
            converted.append(ctypes.c_int64(argument))
        else:
            converted.append(ctypes.c_float(argument))  # type: ignore[arg-type]
    getattr(library(), f"{name}_{_SUFFIX[dtype]}")(
        *converted, ctypes.c_int(torch.get_num_threads())
    )


# --- sums of matrix products


class Quantised:
    """A frozen weight (out, in) in bitsandbytes' NF4, or its transpose; never whole in memory where
    compiled: each task of a product dequantises the block that it multiplies by.
    """

    def __init__(self, parameter: Any, transposed: bool = False) -> None:
        """`parameter` is bitsandbytes' Params4bit."""
        self.parameter, self.transposed = parameter, transposed

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns), as a tensor would have it."""
        rows, columns = self.parameter.quant_state.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def t(self) -> Quantised:
        """Return the transpose."""
        return Quantised(self.parameter, not self.transposed)

    def absmax(self) -> torch.Tensor:
        """Return the scales (out * in / block,) float32: bitsandbytes keeps them in 8 bits, with
        scales of their own.
        """
        from bitsandbytes.functional import dequantize_blockwise

        state = self.parameter.quant_state
        if not state.nested:
            return state.absmax.float()  # type: ignore[no-any-return]
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        return scales.float().contiguous()  # type: ignore[no-any-return]

    def whole(self) -> torch.Tensor:
        """Return the matrix, dequantised by bitsandbytes."""
        from bitsandbytes.functional import dequantize_4bit

        found: torch.Tensor = dequantize_4bit(self.parameter.data, self.parameter.quant_state)
        return found.t() if self.transposed else found


Matrix = torch.Tensor | Quantised


def serves_nf4(parameter: Any, dtype: torch.dtype) -> bool:
    """Return whether `multiply` takes bitsandbytes' `parameter` without dequantising it whole."""
    state = getattr(parameter, "quant_state", None)
    return (
        state is not None
        and state.quant_type == "nf4"
        and state.dtype == dtype
        and state.blocksize % 16 == 0
        and len(state.shape) == 2
        and state.shape[1] % 64 == 0
        and not getattr(state, "packing_format_for_cpu", False)
        and tiles_serve(dtype)
    )


@dataclass(frozen=True)
class Sum:
    """out = bias + the sum of a @ b over the terms, added up in float32 and rounded once where
    compiled.
    """

    out: torch.Tensor  # (rows, columns); its rows may be part of a wider matrix's
    terms: Sequence[tuple[torch.Tensor, Matrix]]  # (rows, depth) @ (depth, columns)
    bias: torch.Tensor | None = None  # (columns,)


def multiply(*sums: Sum) -> None:
    """Fill every `out`; the sums must not depend on each other."""
    if all(_is_compiled(s) for s in sums):
        scales: list[torch.Tensor] = []  # they live until the call is over
        program = [number for s in sums for number in _instructions(s, scales)]
        library().multiply_bfloat16(  # type: ignore[union-attr]
            (ctypes.c_int64 * len(program))(*program),
            ctypes.c_int64(len(sums)),
            ctypes.c_int(torch.get_num_threads()),
        )
        return
    for s in sums:
        (a, b), *rest = [(a, b.whole() if isinstance(b, Quantised) else b) for a, b in s.terms]
        if s.out.dtype != a.dtype:
            s.out.copy_(a @ b)
        elif s.bias is None:
            torch.mm(a, b, out=s.out)
        else:
            torch.addmm(s.bias, a, b, out=s.out)
        for a, b in rest:
            s.out.add_(a @ b) if s.out.dtype != a.dtype else s.out.addmm_(a, b)


def _is_compiled(s: Sum) -> bool:
    """Whether products.cpp takes these layouts: pairs along the summed index must lie in one
    word.
    """

    def even(t: torch.Tensor, depth: int) -> bool:
        return depth % 2 == 0 and t.stride(0) % 2 == 0 and t.data_ptr() % 4 == 0

    def fits(b: torch.Tensor) -> bool:
        along = b.stride(1) == 1 or (b.stride(0) == 1 and even(b.t(), b.shape[0]))
        return b.dtype == torch.bfloat16 and along

    return (
        tiles_serve(s.terms[0][0].dtype)
        and s.out.dtype in _SUFFIX
        and s.out.stride(1) == 1
        and (s.bias is None or (s.bias.dtype == torch.bfloat16 and s.bias.is_contiguous()))
        and all(
            a.dtype == torch.bfloat16
            and (even(a, a.shape[1]) if a.stride(1) == 1 else a.stride(0) == 1)
            and (isinstance(b, Quantised) or fits(b))
            for a, b in s.terms
        )
    )


def _instructions(s: Sum, scales: list[torch.Tensor]) -> list[int]:
    """The numbers that say what `s` is; scales of quantised matrices are added to `scales`."""
    rows, columns = s.out.shape
    bias = 0 if s.bias is None else s.bias.data_ptr()
    numbers = [
        s.out.data_ptr(),
        s.out.stride(0),
        int(s.out.dtype == torch.float32),
        rows,
        columns,
        bias,
        len(s.terms),
    ]
    for a, b in s.terms:
        assert (a.shape[0], a.shape[1], b.shape[1]) == (rows, b.shape[0], columns)
        numbers += _place(a)
        if isinstance(b, Quantised):
            state = b.parameter.quant_state
            scales.append(b.absmax())
            numbers += [b.parameter.data_ptr(), state.shape[1], int(b.transposed), a.shape[1]]
            numbers += [scales[-1].data_ptr(), state.blocksize]
        else:
            numbers += [*_place(b), a.shape[1], 0, 0]
    return numbers


def _place(t: torch.Tensor) -> list[int]:
    along = t.stride(1) == 1
    return [t.data_ptr(), t.stride(0) if along else t.stride(1), int(not along)]


def tiles_serve(dtype: torch.dtype) -> bool:
    """Return whether the compiled products are the faster ones: not where oneDNN would use AMX and
    they could not.
    """
    return dtype == torch.bfloat16 and has_tiles() and (has_amx() or "amx_bf16" not in _processor())


def has_tiles() -> bool:
    """Return whether attention.cpp and products.cpp were built for this processor."""
    compiled = library()
    return compiled is not None and bool(compiled.has_tiles())


@functools.cache
def has_amx() -> bool:
    """Return whether they use AMX: built for it, and the system grants this process its
    registers.
    """
    compiled = library()
    return compiled is not None and bool(compiled.use_amx(ctypes.c_int(1)))


# --- RMSNorm


def rms_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, plus_one: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y like x (rows, n), rstd (rows,) float32); `plus_one` is Gemma's weight of 1 + w,
    rounded once.
    """
    if usable(x.dtype):
        y, rstd = torch.empty_like(x), torch.empty(x.shape[0])
        _call("rms_forward", x.dtype, x, weight, y, rstd, x.shape[0], x.shape[1], eps, plus_one)
        return y, rstd
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    hat = wide * rstd[:, None]
    return (hat * (1.0 + weight.float())).to(x.dtype) if plus_one else weight * hat.to(
        x.dtype
    ), rstd


def rms_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, plus_one: bool
) -> torch.Tensor:
    """Return dx (rows, n): rstd (g - xhat mean(g xhat)), g = dy w, xhat = x rstd; w is frozen."""
    if usable(x.dtype):
        dx = torch.empty_like(x)
        _call("rms_backward", x.dtype, dy, x, weight, rstd, dx, x.shape[0], x.shape[1], plus_one)
        return dx
    hat, g = x.float() * rstd[:, None], dy.float() * (weight.float() + (1.0 if plus_one else 0.0))
    return (rstd[:, None] * (g - hat * (g * hat).mean(-1, keepdim=True))).to(x.dtype)


# --- gated activation


def glu_forward(gate: torch.Tensor, up: torch.Tensor, gelu: bool) -> torch.Tensor:
    """Return act(gate) * up; act is SiLU, or GELU in its tanh form."""
    if usable(gate.dtype):
        h = torch.empty_like(gate)
        _call("glu_forward", gate.dtype, gate, up, h, gate.numel(), gelu)
        return h
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


def glu_backward_(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, gelu: bool
) -> torch.Tensor:
    """Turn gate and up into their gradients, in place; returns h = act(gate) * up, computed
    again.
    """
    if usable(gate.dtype):
        h = torch.empty_like(gate)
        _call("glu_backward", gate.dtype, dh, gate, up, h, gate.numel(), gelu)
        return h
    with torch.enable_grad():
        leaf = gate.detach().clone().requires_grad_()
        activated = F.gelu(leaf, approximate="tanh") if gelu else F.silu(leaf)
    h = activated.detach() * up
    (slope,) = torch.autograd.grad(activated, leaf, dh * up)
    gate.copy_(slope)
    up.copy_(dh * activated.detach())
    return h


# --- attention, whole


def attends(dtype: torch.dtype, dim: int) -> bool:
    """Return whether `attention_forward` serves heads of size `dim` in `dtype` on this
    processor.
    """
    return dtype == torch.bfloat16 and dim % 16 == 0 and has_tiles()


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    nodes: torch.Tensor,
    dim: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out like q, the base-2 logarithm of each row's sum (T, heads) float32); see
    row_attention.py.
    """
    out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[1] // dim)
    cos, sin = rotary or (None, None)
    _call(
        "row_attention_forward",
        q.dtype,
        q,
        k,
        v,
        cos,
        sin,
        out,
        lse,
        nodes,
        *_heads(q, k, nodes, dim),
        window,
        scale,
    )
    return out, lse


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    nodes: torch.Tensor,
    dim: int,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v as they were before rotation."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    cos, sin = rotary or (None, None)
    _call(
        "row_attention_backward", q.dtype, q, k, v, cos, sin, out, lse, dout, dq, dk, dv, nodes,
        *_heads(q, k, nodes, dim), window, scale,
    )  # fmt: skip
    return dq, dk, dv


def _heads(
    q: torch.Tensor, k: torch.Tensor, nodes: torch.Tensor, dim: int
) -> tuple[int, int, int, int]:
    """Return (nodes, heads of keys, heads of queries for each of them, dim)."""
    assert int(nodes[-1, 0] + nodes[-1, 1]) == q.shape[0], "every token belongs to a node"
    return len(nodes), k.shape[1] // dim, q.shape[1] // k.shape[1], dim


# --- attention in blocks: layout and softmax


def pack_heads(
    rows: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    table: torch.Tensor,
    shape: tuple[int, int, int],
) -> torch.Tensor:
    """Return a projection's rows (T, kv * group * dim) as blocks, one (kv, padded, group, dim) a
    sequence, flat.

    `table` (sequences, 4) int64: start, length, padded start, padded length. `rotary`: cos, sin
    (T, dim).
    """
    kv, group, dim = shape
    total = int(table[-1, 2] + table[-1, 3])
    cos, sin = rotary or (None, None)
    if usable(rows.dtype):
        blocks = torch.empty(total * kv * group * dim, dtype=rows.dtype)
        _call("pack_heads", rows.dtype, rows, cos, sin, blocks, table, len(table), kv, group, dim)
        return blocks
    heads = rows.view(-1, kv * group, dim)
    if cos is not None and sin is not None:
        heads = heads * cos[:, None] + rotate_half(heads) * sin[:, None]
    pieces = []
    for start, length, _, padded in table.tolist():
        piece = heads[start : start + length].reshape(length, kv, group, dim).transpose(0, 1)
        pieces.append(F.pad(piece, (0, 0, 0, 0, 0, padded - length)).reshape(-1))
    return torch.cat(pieces)


def unpack_heads(
    blocks: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    table: torch.Tensor,
    shape: tuple[int, int, int],
    tokens: int,
) -> torch.Tensor:
    """Return the blocks as rows (tokens, kv * group * dim); with `rotary`, through the transposed
    rotation.
    """
    kv, group, dim = shape
    cos, sin = rotary or (None, None)
    rows = torch.empty(tokens, kv * group * dim, dtype=blocks.dtype)
    if usable(blocks.dtype):
        _call(
            "unpack_heads", blocks.dtype, blocks, cos, sin, rows, table, len(table), kv, group, dim
        )
        return rows
    width = kv * group * dim
    for start, length, first, padded in table.tolist():
        block = blocks[first * width : (first + padded) * width].view(kv, padded, group, dim)
        rows[start : start + length] = block[:, :length].transpose(0, 1).reshape(length, width)
    if cos is None or sin is None:
        return rows
    heads = rows.view(-1, kv * group, dim)
    return (heads * cos[:, None] - rotate_half(heads * sin[:, None])).reshape(tokens, width)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Return (-second half, first half) of the last dimension: what sin multiplies."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def softmax_forward_(
    scores: torch.Tensor, *, group: int, first_query: int, first_key: int, window: int, scale: float
) -> None:
    """Turn scores (batch, rows, keys) into softmax(scale scores) where 0 <= query - key < window,
    and 0 elsewhere.

    Row r is the query at position first_query + r // group, column j the key at first_key + j.
    """
    batch, rows, keys = scores.shape
    if usable(scores.dtype):
        _call(
            "softmax_forward",
            scores.dtype,
            scores,
            batch,
            rows,
            keys,
            group,
            first_query,
            first_key,
            window,
            scale,
        )
        return
    query = first_query + torch.arange(rows) // group
    distance = query[:, None] - (first_key + torch.arange(keys))[None]
    masked = (
        scores.float()
        .mul_(scale)
        .masked_fill_((distance < 0) | (distance >= window), float("-inf"))
    )
    scores.copy_(F.softmax(masked, dim=-1))


def softmax_backward_(probabilities: torch.Tensor, grad: torch.Tensor, scale: float) -> None:
    """Turn `grad`, the gradient of the probabilities, into that of the unscaled scores, in
    place.
    """
    if usable(grad.dtype):
        keys = grad.shape[-1]
        _call(
            "softmax_backward", grad.dtype, probabilities, grad, grad.numel() // keys, keys, scale
        )
        return
    p, g = probabilities.float(), grad.float()
    grad.copy_(p * (g - (p * g).sum(-1, keepdim=True)) * scale)


# --- cross entropy


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, *, factor: float, cap: float, backward: bool
) -> torch.Tensor:
    """Return the losses (rows,) float32; where `backward`, logits become factor * d loss / d
    logits, in place.

    `cap` c > 0 stands for logits of c tanh(logit / c) (Gemma 2).
    """
    rows, vocabulary = logits.shape
    if usable(logits.dtype):
        losses = torch.empty(rows)
        _call(
            "cross_entropy",
            logits.dtype,
            logits,
            targets,
            losses,
            rows,
            vocabulary,
            factor,
            cap,
            backward,
        )
        return losses
    z = cap * torch.tanh(logits.float() / cap) if cap > 0 else logits.float()
    losses = F.cross_entropy(z, targets, reduction="none")
    if backward:
        slope = F.softmax(z, dim=-1)
        slope.scatter_(1, targets[:, None], torch.expm1(-losses)[:, None])
        if cap > 0:
            slope *= 1 - (z / cap) ** 2
        logits.copy_(slope * factor)
    return losses
