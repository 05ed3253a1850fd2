"""Export GGUF files: base plus adapter, quantised and written in one pass.

architectures.py  the families we write ourselves: names, transforms, metadata; everything else is
refused tokenizer.py      vocabulary, special tokens, splitting rule, chat template quantize.py
ggml's quantisation through ctypes, and which tensor gets which type llama_quantize.py whole files
through llama.cpp's own quantisation writer.py         the file format and the threads lora.py
the adapter alone, for llama.cpp's --lora upstream.py       the way out for unknown models:
llama.cpp's own converter isolated.py       calls into llama.cpp that may end the process: each a
job of llama_job.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import FastFTError
from fastft.exporting.gguf.architectures import Model, Unsupported, describe
from fastft.exporting.gguf.llama_quantize import quantize_file, read_record
from fastft.exporting.gguf.quantize import (
    EMBEDDINGS,
    FILE_TYPES,
    NEEDS_IMATRIX,
    Ggml,
    agrees,
    check_types,
    plan_types,
    unquantized,
)
from fastft.exporting.gguf.tokenizer import read_tokenizer, tokenizer_metadata
from fastft.exporting.gguf.writer import (
    Output,
    header_bytes,
    make_output,
    opened,
    tensor_bytes,
    write_tensors,
)
from fastft.exporting.place import check_disk
from fastft.exporting.weights import Weights
from fastft.files import ours
from fastft.files.scratch import scratch
from fastft.models import tokens_without_row

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FILE_TYPES", "Unsupported", "export_gguf"]


def export_gguf(
    base: Path,
    out: Path,
    types: list[str],
    *,
    adapter: Path | None = None,
    imatrix: dict[str, np.ndarray] | None = None,
    name: str | None = None,
    tokenizer: Path | None = None,
    threads: int | None = None,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Write `base` (+ `adapter`) as one GGUF file for each of `types`, and return a record of each.

    `out`: a folder (files are called NAME.Q4_K_M.gguf), or one file ending in .gguf where there is
    one type. `types`: f32, f16, bf16, q8_0, q4_k_m ... (FILE_TYPES). `imatrix`: GGUF tensor name
    to the mean squared input of each column, float32 (row length,). `tokenizer`: the folder of the
    trained tokenizer; default: the adapter's where it has one, else the base's.
    `progress(values_done, values_total)`; `say(text)` gets the size forecast and any fall-back
    with its reason.

    A record is JSON-able: {"path", "kind": "gguf:q4_k_m", "bytes", "quantization": "Q4_K_M",
    "architecture", "writer": "streaming" | "llama_model_quantize" | "upstream", "notes": [...],
    "tensors": {name: {"shape": [rows, row length], "type": "q4_k"}}}; `shape` is in numpy's order,
    which is GGUF's reversed.

    Raises FastFTError: unknown type, an adapter that does not fit, a type that needs an imatrix,
    a file of that name that fastft did not write, not enough disk (with the numbers), a model that
    neither we nor the upstream converter can write; CouldNotFinishError: the disk filled up. No
    file is left then.
    """
    kinds = check_types(types, imatrix is not None)
    say = say or (lambda text: None)
    weights = Weights(base, adapter, dequantize=dequantize)
    vocabulary = tokenizer or tokenizer_folder(weights)
    paths = _paths(Path(out), kinds, name or _name(weights))
    ours.refuse_foreign(paths.values())
    try:
        model = describe(weights)
        fields = _fields(weights, model, vocabulary, name or _name(weights))
    except Unsupported as reason:
        from fastft.exporting.gguf.upstream import export_upstream

        say(
            f"the streaming writer does not know this model ({reason}); using llama.cpp's own "
            "converter"
        )
        return export_upstream(
            weights, vocabulary, paths, imatrix=imatrix, threads=threads, reason=str(reason)
        )
    _check_lengths(model, imatrix)
    ggml = Ggml()
    plans = _plan(model, fields, kinds, imatrix)
    if plans is None or not agrees(ggml, {t for plan in plans.values() for t in plan.values()}):
        say(
            "ggml_quantize_chunk disagrees with llama_model_quantize here; quantising "
            "through a 16-bit file"
        )
        return _through_16_bit(weights, model, fields, paths, imatrix, threads, progress)
    _check_imatrix(plans, imatrix)
    outputs = [
        make_output(paths[kind], kind, model, _with_type(fields, kind), plans[kind])
        for kind in kinds
    ]
    _forecast(outputs, say)
    with opened(outputs):
        write_tensors(weights, model, outputs, imatrix=imatrix, threads=threads, progress=progress)
    return [_record(output, model, "streaming") for output in outputs]


def tokenizer_folder(weights: Weights) -> Path:
    """Return the folder whose tokenizer the model was trained with: the adapter's where it has
    one.
    """
    own = weights.adapter
    return own if own and (own / "tokenizer_config.json").is_file() else weights.base


def _name(weights: Weights) -> str:
    folder = (weights.adapter or weights.base).resolve()
    return folder.parent.name if folder.name in {"final", "adapter", "merged"} else folder.name


def _paths(out: Path, kinds: list[str], name: str) -> dict[str, Path]:
    if out.suffix == ".gguf" and not out.is_dir():
        if len(kinds) != 1:
            raise FastFTError(
                f"{out} is one file, but {len(kinds)} types are asked for. Give a folder."
            )
        return {kinds[0]: out}
    safe = re.sub(r"[^\w.+-]+", "-", name)
    return {kind: out / f"{safe}.{kind.upper()}.gguf" for kind in kinds}


def _fields(
    weights: Weights, model: Model, vocabulary: Path, name: str
) -> dict[str, tuple[Any, str]]:
    """Return all metadata but the file's type."""
    rows = next(t.shape[0] for t in model.tensors if t.name == "token_embd.weight")
    tokens = tokenizer_metadata(vocabulary, rows, model.arch, weights.base)
    if left_out := tokens_without_row(read_tokenizer(vocabulary), rows):
        model.notes.append(
            f"{', '.join(left_out)} left out: the model has no embedding row for it (ids from "
            f"{rows} on)"
        )
    return {
        "general.type": ("model", "STRING"),
        "general.name": (_safe_name(name, vocabulary), "STRING"),
        ours.GGUF_KEY: (ours.NAME, "STRING"),
        "general.quantization_version": (2, "UINT32"),
        **model.metadata,
        **tokens,
    }


def _safe_name(name: str, vocabulary: Path) -> str:
    """Return a name under which llama.cpp treats the special tokens as the tokenizer does.

    It strips the whitespace after special tokens where the model's name contains phi-3 or phi3,
    and only there.
    """
    added = read_tokenizer(vocabulary).added_tokens_decoder.values()
    strips = any(token.rstrip for token in added if token.special)
    is_named = re.search(r"phi-?3", name, re.IGNORECASE)
    if strips and not is_named:
        return f"{name} (phi-3)"
    return name if strips else re.sub(r"(phi)-?(3)", r"\1 \2", name, flags=re.IGNORECASE)


def _with_type(fields: dict[str, tuple[Any, str]], kind: str) -> dict[str, tuple[Any, str]]:
    return fields | {"general.file_type": (FILE_TYPES[kind], "UINT32")}


def _plan(
    model: Model,
    fields: dict[str, tuple[Any, str]],
    kinds: list[str],
    imatrix: dict[str, np.ndarray] | None,
) -> dict[str, dict[str, str]] | None:
    """Ask llama.cpp for each file's tensor types; None where it does not say."""
    shapes = [(t.name, t.shape) for t in model.tensors]
    sixteen = [(name, shape, unquantized("f16", name, shape)) for name, shape in shapes]
    header, offsets = header_bytes(model.arch, _with_type(fields, "f16"), sixteen)
    size = offsets[-1] + tensor_bytes(sixteen[-1][1], sixteen[-1][2]) + 32
    return plan_types(header, size, shapes, kinds, imatrix is not None)


def _check_imatrix(plans: dict[str, dict[str, str]], imatrix: dict[str, np.ndarray] | None) -> None:
    for file_type, plan in plans.items():
        lacking = sorted(
            tensor
            for tensor, kind in plan.items()
            if kind in NEEDS_IMATRIX and tensor not in (imatrix or {}) and tensor not in EMBEDDINGS
        )
        if lacking:
            raise FastFTError(
                f"{file_type} needs an importance matrix for {len(lacking)} tensors of 3 bits "
                "or fewer, such as "
                f"{lacking[0]}. Collect one with --imatrix auto, or choose q3_k_m or q2_k."
            )


def _check_lengths(model: Model, imatrix: dict[str, np.ndarray] | None) -> None:
    """Raise FastFTError where the importance matrix is another model's: ggml would read past it."""
    lengths = {tensor.name: tensor.shape[-1] for tensor in model.tensors}
    for name, values in (imatrix or {}).items():
        if name in lengths and len(values) != lengths[name]:
            raise FastFTError(
                f"the importance matrix is another model's: {name} has rows of {lengths[name]:,} "
                f"values, the matrix {len(values):,}. Collect one with --imatrix auto."
            )


def _forecast(outputs: list[Output], say: Callable[[str], None]) -> None:
    sizes = ", ".join(f"{o.path.name} {o.size / 2**20:,.1f} MiB" for o in outputs)
    say(f"writing {sizes}")
    check_disk(outputs[0].path, sum(output.size for output in outputs))


def _through_16_bit(
    weights: Weights,
    model: Model,
    fields: dict[str, tuple[Any, str]],
    paths: dict[str, Path],
    imatrix: dict[str, np.ndarray] | None,
    threads: int | None,
    progress: Callable[[int, int], None] | None,
) -> list[dict[str, Any]]:
    """Write one 16-bit file and let llama.cpp quantise it: slower, twice the disk, the same
    answer.
    """
    folder = next(iter(paths.values())).parent
    folder.mkdir(parents=True, exist_ok=True)
    plan = {t.name: unquantized("bf16", t.name, t.shape) for t in model.tensors}
    with scratch(".16-bit-", folder) as work:
        source = make_output(work / "model.gguf", "bf16", model, _with_type(fields, "bf16"), plan)
        _forecast([source], lambda text: None)
        with opened([source]):
            write_tensors(weights, model, [source], threads=threads, progress=progress)
        for kind, path in paths.items():
            quantize_file(source.path, path, kind, imatrix=imatrix, threads=threads)
    return [
        read_record(path, kind, "llama_model_quantize", _notes(model))
        for kind, path in paths.items()
    ]


def _notes(model: Model) -> list[str]:
    return list(model.notes)


def _record(output: Output, model: Model, writer: str) -> dict[str, Any]:
    return {
        "path": str(output.path),
        "kind": f"gguf:{output.file_type}",
        "bytes": output.size,
        "quantization": output.file_type.upper(),
        "architecture": model.arch,
        "writer": writer,
        "notes": _notes(model),
        "tensors": {
            t.name: {"shape": list(t.shape), "type": kind}
            for t, kind in zip(model.tensors, output.types, strict=True)
        },
    }
