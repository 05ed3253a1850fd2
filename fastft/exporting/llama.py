"""Export targets for llama.cpp: GGUF files of any type, the adapter as a LoRA GGUF, an Ollama
Modelfile.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.files import ours
from fastft.models import explained, tokenizer_of
from fastft.progress import Reporter
from fastft.runs.target import Target

RESTORE_SAMPLES = "Delete the file and call fastft train again, which writes it."
OLLAMA_DEFAULT = "q4_k_m"  # what `ollama` is made of where no GGUF type was asked for


def export_for_llamacpp(
    target: Target,
    folder: Path,
    types: list[str],
    *,
    lora: bool,
    ollama: bool,
    imatrix: str | None,
    report: Reporter,
) -> list[dict[str, Any]]:
    """Write what was asked for into `folder`; returns {"path", "kind", "bytes"} of each file.

    `imatrix` is None, "auto" (collected on the run's own samples), or a file that `--imatrix auto`
    wrote before.
    """
    from fastft.exporting.gguf import export_gguf
    from fastft.exporting.gguf.lora import export_gguf_lora

    base = base_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    if ollama:
        ours.refuse_foreign([folder / "Modelfile"])
    files: list[dict[str, Any]] = []
    wanted = types or ([OLLAMA_DEFAULT] if ollama else [])
    if wanted:
        matrix = importance(target, folder, imatrix, report)
        with report.bytes("writing GGUF") as progress:
            records = export_gguf(
                base, folder, wanted, adapter=target.adapter, imatrix=matrix, name=target.name,
                progress=progress, say=report.note,
            )  # fmt: skip
        files += [{key: record[key] for key in ("path", "kind", "bytes")} for record in records]
    if lora:
        if target.adapter is None:
            raise FastFTError(f"{target.base} is a plain model; it has no adapter to export.")
        record = export_gguf_lora(base, target.adapter, folder, name=target.name)
        files.append({key: record[key] for key in ("path", "kind", "bytes")})
    if ollama:
        files.append(_modelfile(target, folder, Path(files[0]["path"]), report))
    return files


def base_folder(target: Target) -> Path:
    """Return the local folder of the 16-bit base; downloads it where only its Hub id is known."""
    from fastft.exporting.weights import resolve_base

    if target.adapter is not None:
        return resolve_base(target.adapter, target.base)
    folder = Path(target.base).expanduser()
    return folder if folder.is_dir() else resolve_base(folder, target.base)


def sample_ids(target: Target) -> list[dict[str, list[int]]]:
    """Return the run's kept samples ({"input_ids", "labels"}), or nothing for an adapter without a
    run.
    """
    if target.run is None or not target.run.samples.is_file():
        return []
    return read_samples(target.run.samples)


def read_samples(path: Path) -> list[dict[str, list[int]]]:
    """Return the lines of samples.jsonl; raises FastFTError naming the one that is none."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise FastFTError(f"{path} is damaged: {error}. {RESTORE_SAMPLES}") from error
    for number, line in enumerate(lines, 1):
        try:
            sample = json.loads(line)
            numbers = [sample["input_ids"], sample["labels"]]
            whole = all(type(i) is int and -100 <= i < 2**31 for ids in numbers for i in ids)
            if not whole or len(numbers[0]) != len(numbers[1]):
                raise ValueError("no token ids, or other labels than ids")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise FastFTError(
                f"{path} line {number} is damaged: {error}. {RESTORE_SAMPLES}"
            ) from error
        found.append(sample)
    return found


def importance(target: Target, folder: Path, imatrix: str | None, report: Reporter) -> Any:
    """Return the importance matrix that --imatrix asks for ({tensor: mean squared inputs}), or
    None.
    """
    from fastft.exporting.gguf.imatrix import (
        collect_imatrix,
        load_imatrix,
        refuse_foreign,
        save_imatrix,
    )

    if imatrix is None:
        return None
    if imatrix != "auto":
        if not Path(imatrix).is_file():
            raise FastFTError(
                f"--imatrix {imatrix}: no such file. Write auto to collect one from the run's "
                "own data."
            )
        return load_imatrix(imatrix)
    samples = sample_ids(target)
    if not samples:
        raise FastFTError(
            "--imatrix auto needs a run folder: its samples.jsonl holds the data that it is "
            "collected on."
        )
    refuse_foreign(folder / "imatrix.npz")
    from fastft.inference.generate import HuggingFaceChat

    report.note(f"importance matrix: from {len(samples)} of the run's own samples")
    matrix = collect_imatrix(
        HuggingFaceChat(target).model, [sample["input_ids"] for sample in samples]
    )
    save_imatrix(folder / "imatrix.npz", matrix)
    return matrix


def tokenizer_source(target: Target) -> Path:
    """Return the adapter's folder where it has a tokenizer of its own, else the base's."""
    own = target.adapter
    return own if own and (own / "tokenizer_config.json").is_file() else base_folder(target)


def _modelfile(target: Target, folder: Path, gguf: Path, report: Reporter) -> dict[str, Any]:
    from fastft.data.template import choose_template
    from fastft.exporting.ollama import create_line, has_template, write_modelfile

    source = str(tokenizer_source(target))
    with explained(source):
        tokenizer = tokenizer_of(source)
    template = choose_template(tokenizer, None)
    stops = tokenizer.convert_ids_to_tokens(list(template.end_token_ids))
    bos = tokenizer.bos_token or ""

    def render(messages: list[dict[str, str]]) -> str:
        return template.render(messages, prompt=True).removeprefix(bos)

    path = write_modelfile(folder, gguf, tokenizer, stops=stops, name=target.name, render=render)
    if not has_template(path):
        report.warn(
            "the Modelfile has no TEMPLATE: Go's template language cannot write what this chat "
            "template writes, and Ollama will take one of its own that looks alike. Its answers "
            "may differ from the trained model's; `fastft chat` asks exactly."
        )
    report.note(f"Ollama: {create_line(path, target.name)}")
    return {"path": str(path), "kind": "ollama", "bytes": path.stat().st_size}
