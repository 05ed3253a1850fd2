"""Write GGUF files in one pass: read some rows, add the adapter, quantise them for every file,
write them in place.

The header is known before the first weight is read, so every row's place in every file is known
too: threads work on chunks of rows in any order, and the memory in use is a few chunks, whatever
the model's size.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastft.errors import CouldNotFinishError, FastFTError
from fastft.exporting.gguf.architectures import Model, Tensor
from fastft.exporting.gguf.quantize import UNQUANTIZED, Ggml, row_bytes, type_number
from fastft.exporting.weights import Weights
from fastft.files import written_aside
from fastft.hardware import usable_cores

if TYPE_CHECKING:
    import numpy as np

ALIGNMENT = 32
CHUNK_VALUES = 2**20  # 4 MiB of float32: stays in the cache, and a few chunks a thread are nothing
KINDS = {
    "UINT8": (0, "<B"),
    "UINT32": (4, "<I"),
    "INT32": (5, "<i"),
    "FLOAT32": (6, "<f"),
    "BOOL": (7, "<?"),
}
STRING, ARRAY = 8, 9


def header_bytes(
    arch: str, fields: dict[str, tuple[Any, str]], tensors: list[tuple[str, tuple[int, ...], str]]
) -> tuple[bytes, list[int]]:
    """Return a GGUF header (version 3), padded, and the offset of each tensor's data from the
    file's start.

    `fields`: key to (value, UINT32 | INT32 | FLOAT32 | BOOL | STRING, or one of these with S for
    an array). `tensors`: (name, shape in numpy's order, tensor type). Format: docs/gguf.md in
    ggml's repository.
    """
    everything = {"general.architecture": (arch, "STRING"), **fields}
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(everything))]
    parts += [_text(key) + _value(value, kind) for key, (value, kind) in everything.items()]
    offsets, end = [], 0
    for name, shape, kind in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_text(name) + dimensions + struct.pack("<IQ", int(type_number(kind)), end))
        offsets.append(end)
        end += _padded(tensor_bytes(shape, kind))
    head = b"".join(parts)
    head += b"\0" * (_padded(len(head)) - len(head))
    return head, [len(head) + offset for offset in offsets]


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Return the bytes of a tensor's data."""
    rows = 1
    for length in shape[:-1]:
        rows *= length
    return rows * row_bytes(kind, shape[-1])


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any, kind: str) -> bytes:
    if kind == "STRING":
        return struct.pack("<I", STRING) + _text(value)
    if kind == "STRINGS":
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if kind in KINDS:
        number, form = KINDS[kind]
        return struct.pack("<I", number) + struct.pack(form, value)
    number, form = KINDS[kind.removesuffix("S")]
    return struct.pack("<IIQ", ARRAY, number, len(value)) + struct.pack(
        f"<{len(value)}{form[1:]}", *value
    )


@dataclass
class Output:
    """One file to be written."""

    path: Path
    file_type: str
    header: bytes
    offsets: list[int]
    types: list[str]
    size: int
    file: BinaryIO | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, offset: int, data: Any) -> None:
        """Write `data` at `offset`; threads may call it."""
        assert self.file is not None
        with self.lock:
            self.file.seek(offset)
            self.file.write(data)


def make_output(
    path: Path,
    file_type: str,
    model: Model,
    fields: dict[str, tuple[Any, str]],
    types: dict[str, str],
) -> Output:
    """Lay out the file: header, every tensor's place, size."""
    entries = [(t.name, t.shape, types[t.name]) for t in model.tensors]
    header, offsets = header_bytes(model.arch, fields, entries)
    last = entries[-1]
    size = offsets[-1] + _padded(tensor_bytes(last[1], last[2]))
    return Output(path, file_type, header, offsets, [kind for _, _, kind in entries], size)


@contextmanager
def opened(outputs: list[Output]) -> Iterator[None]:
    """Open every output aside; rename all when the block ends well, remove all otherwise. A full
    disk becomes CouldNotFinishError.
    """
    try:
        with ExitStack() as stack:
            for output in outputs:
                output.path.parent.mkdir(parents=True, exist_ok=True)
                aside = stack.enter_context(written_aside(output.path, ending=".part"))
                output.file = stack.enter_context(open(aside, "wb", buffering=0))
                output.file.write(output.header)
                output.file.truncate(output.size)
            yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        total = sum(output.size for output in outputs)
        raise CouldNotFinishError(
            f"the disk of {outputs[0].path.parent} is full: {total:,} bytes were to be "
            "written. Nothing was left."
        ) from error


def write_tensors(
    weights: Weights,
    model: Model,
    outputs: list[Output],
    *,
    imatrix: dict[str, np.ndarray] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill the opened `outputs` with every tensor, all of them from one reading of the weights."""
    import torch

    ggml = Ggml()
    jobs = [
        (i, tensor, first, last)
        for i, tensor in enumerate(model.tensors)
        for first, last in _chunks(tensor)
    ]
    total = sum(_values(tensor.shape) for tensor in model.tensors)
    done = 0
    inside = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool is the parallelism
    try:
        with ThreadPoolExecutor(threads or usable_cores()) as pool:
            work: dict[Future[None], int] = {}
            for index, tensor, first, last in jobs:
                future = pool.submit(
                    _write_chunk, ggml, weights, index, tensor, first, last, outputs, imatrix or {}
                )
                work[future] = _values(tensor.shape) // tensor.shape[0] * (last - first)
            try:
                pending = set(work)
                while pending:
                    finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                    for future in finished:
                        future.result()
                        done += work[future]
                    if progress:
                        progress(done, total)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        torch.set_num_threads(inside)


def _chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Cut a tensor into row ranges of about CHUNK_VALUES values, never through a head."""
    rows = tensor.shape[0]
    per_row = _values(tensor.shape) // rows
    step = max(1, CHUNK_VALUES // per_row // tensor.step) * tensor.step
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _write_chunk(
    ggml: Ggml,
    weights: Weights,
    index: int,
    tensor: Tensor,
    first: int,
    last: int,
    outputs: list[Output],
    imatrix: dict[str, np.ndarray],
) -> None:
    import numpy

    rows = tensor.rows(weights, first, last).contiguous().numpy()
    if not numpy.isfinite(rows).all():
        raise FastFTError(
            f"{tensor.source or tensor.name} holds NaN or infinite values: the training diverged."
        )
    row = rows.reshape(-1, rows.shape[-1])
    made: dict[str, Any] = {}
    for output in outputs:
        kind = output.types[index]
        if kind not in made:
            made[kind] = _as_type(ggml, kind, row, tensor, imatrix)
        per_row = tensor_bytes(tensor.shape[1:], kind) if rows.ndim > 1 else row_bytes(kind, 1)
        output.write(output.offsets[index] + first * per_row, made[kind])


def _as_type(
    ggml: Ggml, kind: str, row: np.ndarray, tensor: Tensor, imatrix: dict[str, np.ndarray]
) -> Any:
    """Return float32 rows as bytes of tensor type `kind`."""
    import numpy
    import torch

    if kind == "f32":
        return row.view(numpy.uint8).reshape(-1)
    if kind in UNQUANTIZED:
        found = torch.from_numpy(row).to(torch.float16 if kind == "f16" else torch.bfloat16)
        if kind == "f16" and not torch.isfinite(found).all():
            raise FastFTError(
                f"{tensor.source or tensor.name} has values above 65504, which f16 cannot hold. "
                "Export bf16 instead."
            )
        return found.view(torch.uint8).reshape(-1).numpy()
    return ggml.quantize(kind, row, imatrix.get(tensor.name))


def _values(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
