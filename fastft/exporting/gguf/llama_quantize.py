"""Whole files through llama.cpp itself: quantise one of 16 bit, and read what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import CouldNotFinishError
from fastft.exporting.gguf.isolated import run_isolated
from fastft.exporting.gguf.quantize import (
    FILE_TYPES,
)
from fastft.files.scratch import scratch
from fastft.hardware import usable_cores

if TYPE_CHECKING:
    import numpy as np


SMALL_BUFFER = 256 * 2**20  # bytes that llama_model_quantize may hold of a tensor


def quantize_file(
    source: Path,
    out: Path,
    kind: str,
    *,
    imatrix: dict[str, np.ndarray] | None = None,
    threads: int | None = None,
) -> None:
    """Quantise a 16-bit GGUF file with llama.cpp itself, in a subprocess and in little memory."""
    import numpy

    with scratch(".quantise-", out.parent) as work:
        weights = work / "imatrix.npz"
        if imatrix:
            numpy.savez(weights, **imatrix)  # type: ignore[arg-type]
        made = work / "made.gguf"
        answers, died = run_isolated(
            do="quantize",
            source=str(source),
            out=str(made),
            ftype=FILE_TYPES[kind],
            threads=threads or usable_cores(),
            imatrix=str(weights) if imatrix else None,
            max_buf_size=SMALL_BUFFER,
        )
        if died or not answers or answers[0]["failed"]:
            why = died or (answers[0]["log"] if answers else "no answer")
            raise CouldNotFinishError(f"llama.cpp could not quantise to {kind}: {why}")
        made.replace(out)


def read_record(path: Path, kind: str, writer: str, notes: list[str]) -> dict[str, Any]:
    """Return the record of a file that llama.cpp wrote, as it stands in the file."""
    import gguf

    reader = gguf.GGUFReader(path)
    field = reader.fields["general.architecture"]
    shapes = {t.name: [int(n) for n in reversed(t.shape)] for t in reader.tensors}
    return {
        "path": str(path),
        "kind": f"gguf:{kind}",
        "bytes": path.stat().st_size,
        "quantization": kind.upper(),
        "architecture": str(field.contents()),
        "writer": writer,
        "notes": notes,
        "tensors": {
            t.name: {"shape": shapes[t.name], "type": t.tensor_type.name.lower()}
            for t in reader.tensors
        },
    }
