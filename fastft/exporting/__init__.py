"""`fastft export`: from a run, an adapter or a model folder to the files that people use, one
target each.

adapter     a peft folder                       merged      a transformers folder
gguf:TYPE   a llama.cpp file of that type       gguf-lora   the adapter alone, for llama.cpp
ollama      a Modelfile beside the GGUF file
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.config import export_targets
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.exporting.certificate import forget, refuse_foreign
from fastft.exporting.place import one_at_a_time
from fastft.progress import Reporter, sized
from fastft.runs.mirror import follow
from fastft.runs.target import Target, resolve


@dataclass(frozen=True)
class Request:
    """What a target is made of, and where it goes."""

    target: Target
    folder: Path
    dtype: str
    """Of merged: auto, float32, bfloat16, float16."""
    imatrix: str | None
    report: Reporter


def export(
    run: str | Path,
    to: list[str],
    *,
    out: str | Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    imatrix: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write the targets `to` of `run` and return {"files": [{"path", "kind", "bytes"}], "refused":
    [{"target", "why"}]}.

    Every target is written whole or not at all, and one that cannot be written does not stop the
    others. Raises FastFTError for unknown targets, and, where nothing could be written, what the
    first target refused.
    """
    wanted = parse_targets(to)
    target = resolve(run, base=base)
    folder = Path(out).expanduser() if out is not None else target.default_out
    report = reporter or Reporter()
    request = Request(target, folder, dtype, imatrix, report)
    files: list[dict[str, Any]] = []
    refused: list[tuple[str, FastFTError]] = []
    with one_at_a_time(folder):
        refuse_foreign(folder)  # said before anything is written
        try:
            for group in _groups(wanted):
                try:
                    files += _write(request, group)
                except FastFTError as error:
                    if isinstance(error, CouldNotFinishError):  # a full disk is full for all
                        raise
                    refused += [(kind, error) for kind in group]
        finally:  # also where the next one ended it: what was written is not what was certified
            forget(folder, [Path(entry["path"]).name for entry in files])
    if refused and not files:
        raise refused[0][1]
    for entry in files:
        report.note(f"wrote {entry['path']} ({sized(entry['bytes'])})")
    for kind, why in refused:
        report.warn(f"{kind} was not written: {why}")
    if target.run is not None:
        follow(target.run, note=report.note, warn=report.warn)
    return {"files": files, "refused": [{"target": kind, "why": str(why)} for kind, why in refused]}


def _groups(wanted: list[str]) -> list[list[str]]:
    """Return the targets in groups that are written together: GGUF types share one pass over the
    weights, and the Modelfile is made of one of them.
    """
    alone = [[kind] for kind in wanted if kind in {*WRITERS, "gguf-lora"}]
    together = [kind for kind in wanted if kind not in {*WRITERS, "gguf-lora"}]
    return alone + ([together] if together else [])


def _write(request: Request, group: list[str]) -> list[dict[str, Any]]:
    if group[0] in WRITERS:
        return WRITERS[group[0]](request)
    if group == ["gguf-lora"]:
        _refuse_unholdable(request.target)
    return _for_llamacpp(request, group)


def is_exported(run: Path, kind: str) -> bool:
    """Return whether the run's export/ holds the target `kind` already."""
    patterns = {"adapter": "../final", "merged": "merged", "ollama": "Modelfile"}
    patterns["gguf-lora"] = "*.lora.gguf"
    pattern = patterns.get(kind) or f"*.{kind.removeprefix('gguf:').upper()}.gguf"
    return any((run / "export").glob(pattern)) if pattern != "../final" else True


def parse_targets(to: list[str]) -> list[str]:
    """Return the targets, each once, in the order given; raises one FastFTError for all unknown
    ones.
    """
    try:
        if not to:
            raise ValueError("no export target given; write, for example, --to merged.")
        return export_targets(to)
    except ValueError as error:
        raise FastFTError(str(error)) from error


def describe(path: Path, kind: str) -> dict[str, Any]:
    """Return {"path", "kind", "bytes"} of a file or folder."""
    size = (
        path.stat().st_size
        if path.is_file()
        else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    )
    return {"path": str(path), "kind": kind, "bytes": size}


def _refuse_unholdable(target: Target) -> None:
    """Raise FastFTError for an adapter that a LoRA GGUF cannot hold, before anything is written."""
    from fastft.exporting.gguf.lora import check_holdable
    from fastft.exporting.llama import base_folder
    from fastft.exporting.weights import Weights

    if target.adapter is None:
        raise FastFTError(f"{target.base} is a plain model; it has no adapter to export.")
    check_holdable(Weights(base_folder(target), target.adapter))


def _for_llamacpp(request: Request, kinds: list[str]) -> list[dict[str, Any]]:
    """Write all GGUF files in one pass over the weights, then what is made from them."""
    from fastft.exporting.llama import export_for_llamacpp

    return export_for_llamacpp(
        request.target,
        request.folder,
        [kind.split(":")[1] for kind in kinds if kind.startswith("gguf:")],
        lora="gguf-lora" in kinds,
        ollama="ollama" in kinds,
        imatrix=request.imatrix,
        report=request.report,
    )


def _adapter(request: Request) -> list[dict[str, Any]]:
    from fastft.runs.adapter import copy_adapter

    target, folder = request.target, request.folder
    if target.adapter is None:
        raise FastFTError(f"{target.base} is a plain model; it has no adapter to export.")
    # A run's own final/ is the adapter already; a copy goes only where the user asked for one.
    in_place = target.run is not None and folder == target.run.export
    path = target.adapter if in_place else copy_adapter(target.adapter, folder / "adapter")
    return [describe(path, "adapter")]


def _merged(request: Request) -> list[dict[str, Any]]:
    from fastft.exporting.merged import export_merged
    from fastft.exporting.weights import resolve_base
    from fastft.runs.card import model_card, write_card

    target, out = request.target, request.folder / "merged"
    if target.adapter is None:
        raise FastFTError(f"{target.base} is a plain model; there is nothing to merge.")
    base = resolve_base(target.adapter, target.base)
    with request.report.bytes("merging") as progress:
        export_merged(base, target.adapter, out, dtype=request.dtype, progress=progress)
    if target.run is not None:
        card = model_card(target.run.read_config(), target.run.read_record(), kind="merged")
        if kept := write_card(out / "README.md", card):
            request.report.note(kept)
    return [describe(out, "merged")]


WRITERS: dict[str, Callable[[Request], list[dict[str, Any]]]] = {
    "adapter": _adapter,
    "merged": _merged,
}
"""How each target is written; those for llama.cpp share one pass over the weights."""
