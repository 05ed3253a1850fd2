"""Export the merged model: base plus adapter as 16-bit (or float32) safetensors, written tensor by
tensor.

Every tensor is round(W + delta), where the sum is computed in float32. Peak memory is one tensor;
the folder is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.exporting.place import whole_or_nothing
from fastft.exporting.weights import Weights
from fastft.files.ours import is_ours

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5_000_000_000
MARK = "fastft export"
# What makes a tokenizer; the adapter's own files (added tokens, a new template) win over the
# base's.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
BASE_FILES = (
    "tokenizer.model", "spiece.model", "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


def export_merged(
    base: Path,
    adapter: Path | None,
    out: Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = SHARD_BYTES,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write `base` + `adapter` as a plain transformers folder `out`; return its files.

    `dtype`: auto (each tensor as the base stores it), float32, bfloat16 or float16. Shards hold at
    most `max_shard_bytes` (one tensor may be larger). `progress(bytes_done, bytes_total)` is
    called after each tensor.

    Raises FastFTError: unknown dtype, `out` exists and was not written here, not enough disk (with
    the numbers), and all that `Weights` refuses; CouldNotFinishError: the disk filled up
    meanwhile.
    """
    if dtype not in {"auto", *BYTES}:
        raise FastFTError(
            f"unknown dtype {dtype!r} for a merged model. Known: auto, {', '.join(BYTES)}."
        )
    weights = Weights(base, adapter, dequantize=dequantize)
    kinds = {name: weights.dtype(name) if dtype == "auto" else dtype for name in weights.names}
    plan = _plan_shards(weights, kinds, max_shard_bytes)
    total = sum(size for shard in plan for _, size in shard)
    out = Path(out)
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise FastFTError(
            f"{out} exists and was not written by fastft. Choose another --out, or remove it."
        )

    def replaced(name: str) -> bool:
        return belongs_to_merged(name) and (name != "README.md" or is_ours(out / name))

    with whole_or_nothing(out, total, replaced) as folder:
        _write_shards(weights, kinds, plan, folder, progress)
        _write_config(weights, kinds, folder)
        _copy_tokenizer(weights, folder)
    return sorted(out.iterdir())


def belongs_to_merged(name: str) -> bool:
    """Whether a file of this name in a merged folder is one of ours."""
    weights = r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    ours = {*TOKENIZER_FILES, *BASE_FILES, "config.json", "README.md"}
    return name in ours or re.fullmatch(weights, name) is not None


def _is_ours(folder: Path) -> bool:
    """Whether every weight file in `folder` was written here: only such a folder is replaced."""
    found = list(folder.glob("*.safetensors"))
    for path in found:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
            if MARK.encode() not in file.read(min(length, 200)):
                return False
    return bool(found)


def _plan_shards(
    weights: Weights, kinds: dict[str, str], limit: int
) -> list[list[tuple[str, int]]]:
    """Split the tensors, in order, into shards of (name, bytes)."""
    shards: list[list[tuple[str, int]]] = [[]]
    for name in weights.names:
        size = BYTES.get(kinds[name], 8)
        for length in weights.shape(name):
            size *= length
        if shards[-1] and sum(s for _, s in shards[-1]) + size > limit:
            shards.append([])
        shards[-1].append((name, size))
    return shards


def _write_shards(
    weights: Weights,
    kinds: dict[str, str],
    plan: list[list[tuple[str, int]]],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(size for shard in plan for _, size in shard)
    done = 0
    where: dict[str, str] = {}
    for number, shard in enumerate(plan, 1):
        name = (
            "model.safetensors"
            if len(plan) == 1
            else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        )
        with open(folder / name, "wb") as file:
            file.write(_header(weights, kinds, shard))
            for tensor, size in shard:
                file.write(_bytes(weights, tensor, kinds[tensor]))
                where[tensor] = name
                done += size
                if progress:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )


def _header(weights: Weights, kinds: dict[str, str], shard: list[tuple[str, int]]) -> bytes:
    """Return a safetensors header: 8 bytes of length, then JSON padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "written_by": MARK}}
    offset = 0
    for name, size in shard:
        code = CODES.get(kinds[name], "I64")
        entries[name] = {
            "dtype": code,
            "shape": list(weights.shape(name)),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(weights: Weights, name: str, kind: str) -> Any:
    import torch

    tensor = weights.tensor(name).to(getattr(torch, kind)).contiguous()
    if kind == "float16" and not torch.isfinite(tensor).all():
        raise FastFTError(
            f"{name} does not fit into float16 (largest value 65504). Use --dtype bfloat16."
        )
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _write_config(weights: Weights, kinds: dict[str, str], folder: Path) -> None:
    config = {
        k: v for k, v in weights.config.items() if k not in {"quantization_config", "torch_dtype"}
    }
    sizes = {kind: sum(k == kind for k in kinds.values()) for kind in kinds.values()}
    config["dtype"] = max(sizes, key=lambda kind: sizes[kind])
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _copy_tokenizer(weights: Weights, folder: Path) -> None:
    """Copy the tokenizer: the adapter's files where it has a tokenizer, and always the base's
    tokenizer.model.
    """
    own = (
        weights.adapter
        if weights.adapter and (weights.adapter / "tokenizer_config.json").is_file()
        else None
    )
    for name in TOKENIZER_FILES:
        source = (own or weights.base) / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
    for name in BASE_FILES:
        sources = [place / name for place in (weights.adapter, weights.base) if place]
        found = next((s for s in sources if s.is_file()), None)
        if found:
            shutil.copyfile(found, folder / name)
