"""The way out for models that we do not write ourselves: llama.cpp's own converter.

It lies in the source archive of llama-cpp-python. The archive that matches the installed version
is fetched once from PyPI with pip, kept in ~/.cache/fastft, and its script is run as a subprocess
with the gguf-py that it came with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import child
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.exporting.gguf.quantize import UNQUANTIZED, cache_folder
from fastft.exporting.merged import export_merged
from fastft.exporting.place import check_disk
from fastft.exporting.weights import Weights
from fastft.files import ours, sha256
from fastft.files.scratch import scratch

if TYPE_CHECKING:
    import numpy as np

SDIST_SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}
"""Hashes of the source archives whose converter was tried; another version's must be given in
FASTFT_CONVERTER_SHA256.
"""
PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")


def export_upstream(
    weights: Weights,
    vocabulary: Path,
    paths: dict[str, Path],
    *,
    imatrix: dict[str, np.ndarray] | None,
    threads: int | None,
    reason: str,
) -> list[dict[str, Any]]:
    """Merge, convert with the upstream converter, quantise with llama.cpp; return a record of each
    file.

    Needs disk for the merged model and a 16-bit file besides the result. Raises FastFTError where
    the upstream converter does not know the model either, CouldNotFinishError where it cannot be
    fetched.
    """
    from fastft.exporting.gguf.llama_quantize import quantize_file, read_record

    converter = upstream_folder()
    out = next(iter(paths.values())).parent
    out.mkdir(parents=True, exist_ok=True)
    sixteen = sum(_values(weights.shape(name)) for name in weights.names) * 2
    check_disk(out, 3 * sixteen)
    words = _own_words(vocabulary, weights)
    with scratch(".upstream-", out) as work:
        model = weights.base
        if weights.adapter:
            model = work / "merged"
            export_merged(weights.base, weights.adapter, model)
        made: dict[str, Path] = {}
        for kind in paths:
            step = kind if kind in UNQUANTIZED else "bf16"
            if step not in made:
                made[step] = work / f"{step}.gguf"
                has_mtp = any(name.startswith("mtp.") for name in weights.names)
                convert(converter, model, made[step], step, words, has_mtp=has_mtp)
        for kind, path in paths.items():
            if kind not in UNQUANTIZED:
                quantize_file(made["bf16"], path, kind, imatrix=imatrix, threads=threads)
        for kind, path in paths.items():
            if kind in UNQUANTIZED:
                made[kind].replace(path)
    notes = [f"written by llama.cpp's converter: {reason}"]
    return [read_record(path, kind, "upstream", notes) for kind, path in paths.items()]


def convert(
    converter: Path,
    model: Path,
    out: Path,
    kind: str,
    tokenizer: dict[str, tuple[Any, str]] | None = None,
    *,
    has_mtp: bool = False,
) -> None:
    """Run the upstream converter on the folder `model`; FastFTError with its last words where it
    fails.

    `tokenizer`: GGUF's tokenizer keys as `tokenizer_metadata` found them by behaviour, for what the
    converter does not know (a splitting rule, BOS) or reads from a tokenizer.model that
    transformers no longer saves. `has_mtp`: the checkpoint holds the heads that predict several
    tokens (Qwen3.5's `mtp.*`). transformers saves a model without them, and the converter must be
    told.
    """
    about = out.with_name("metadata.json")
    about.write_text(json.dumps({ours.GGUF_KEY: ours.NAME}), encoding="utf-8")
    words = out.with_name("tokenizer_keys.json")
    words.write_text(json.dumps(tokenizer or {}), encoding="utf-8")
    files = ("--outfile", str(out), "--metadata", str(about))
    script = ("convert_hf_to_gguf.py", str(model), *files, "--outtype", kind)
    done = subprocess.run(
        child.command("fastft.exporting.gguf.convert", str(converter), *script),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
        env=child.environment(
            FASTFT_TOKENIZER=str(words),
            FASTFT_NO_MTP="" if has_mtp else "1",
            HF_HUB_OFFLINE="1",
        ),
    )
    if done.returncode or not out.is_file():
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise FastFTError(
            f"llama.cpp's converter cannot write this model either:\n{last}\nUse the merged "
            "model (--to merged) with "
            "transformers, or a newer llama-cpp-python."
        )


def _own_words(vocabulary: Path, weights: Weights) -> dict[str, tuple[Any, str]] | None:
    """Return the tokenizer's keys as fastft's own writer would write them; None where the tokenizer
    is of a kind that it does not know.
    """
    from fastft.exporting.gguf.architectures import Unsupported
    from fastft.exporting.gguf.tokenizer import tokenizer_metadata

    try:
        return tokenizer_metadata(vocabulary, _token_rows(weights), "", weights.base)
    except Unsupported:
        return None


def _token_rows(weights: Weights) -> int:
    """Return the embedding's rows: of its tensor, which an adapter may have resized, or where it
    has another name (GPT-2's wte), as the config says.
    """
    named = [name for name in weights.names if name.endswith("embed_tokens.weight")]
    if named:
        return weights.shape(named[0])[0]
    config = weights.config.get("text_config", weights.config)
    return int(config["vocab_size"])


def upstream_folder() -> Path:
    """Return the folder with the upstream converter of the installed llama-cpp-python; fetched at
    first use.
    """
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError as error:
        raise FastFTError(
            "llama-cpp-python is not installed; pip install 'fastft[gguf]'"
        ) from error
    home = cache_folder() / f"llama.cpp-{version}"
    if (home / PARTS[0]).is_file():
        return home
    home.parent.mkdir(parents=True, exist_ok=True)
    with scratch(".llama.cpp-", home.parent) as work:
        unpacked = work / "converter"
        archive = _download(version, work)
        check_archive(archive, version)
        _unpack(archive, unpacked)
        shutil.rmtree(home, ignore_errors=True)
        unpacked.rename(home)
    return home


def _download(version: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        "llama-cpp-python",
    ]
    done = subprocess.run(
        [*command, "-d", str(folder), f"llama-cpp-python=={version}"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = next(folder.glob("llama_cpp_python-*.tar.gz"), None)
    if done.returncode or found is None:
        raise CouldNotFinishError(
            f"could not fetch llama.cpp's converter (the llama-cpp-python {version} source "
            "archive, 77 MB, from PyPI): "
            f"{done.stderr.strip()[-300:]}\nIt is needed once for models that fastft does not "
            "write itself."
        )
    return found


def check_archive(archive: Path, version: str) -> None:
    """Raise FastFTError unless the archive is the known one: a program out of it will run here."""
    expected = os.environ.get("FASTFT_CONVERTER_SHA256") or SDIST_SHA256.get(version)
    found = sha256(archive)
    if expected is None:
        raise FastFTError(
            f"the converter in llama-cpp-python {version} is not one that fastft knows (known: "
            f"{', '.join(SDIST_SHA256)}). Install a known version, or, where you trust this one, "
            f"set FASTFT_CONVERTER_SHA256={found}."
        )
    if found != expected.lower():
        raise FastFTError(
            f"{archive.name} is not the archive it should be: its sha256 is {found}, not "
            f"{expected}. Nothing of it was run; check the package index that pip uses."
        )


def _unpack(archive: Path, out: Path) -> None:
    """Unpack the converter's own files, and no other part of the archive."""
    out.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            _, found, inner = member.name.partition("/vendor/llama.cpp/")
            if found and inner.startswith(PARTS) and member.isfile():
                member.name = inner
                tar.extract(member, out, filter="data")
    if not (out / PARTS[0]).is_file():
        raise FastFTError(f"{archive.name} holds no {PARTS[0]}.")


def _values(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
