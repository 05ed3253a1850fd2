"""The tokenised form of large data on disk, found again by its fingerprint.

    FINGERPRINT/samples, eval_samples, train, eval     stores of samples (store.py)
    FINGERPRINT/train.order.npy, eval.order.npy        which samples of a store these are
    FINGERPRINT/prepared.json                          report, held-out conversations, stores
    FINGERPRINT/manifest.json                          size and sha256 of all of them, written last

A folder counts only when its manifest agrees with what lies there; otherwise it is made anew.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastft.data.store import TokenDataset, open_folder
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.files import flush, put_in_place, sha256
from fastft.files.scratch import scratch

_INDEX, _MANIFEST = "prepared.json", "manifest.json"


class WorkFolder:
    """A folder beside the final one, put in its place when all is written and removed when not;
    None for data in memory.
    """

    def __init__(self, final: Path | None) -> None:
        self.final = final
        self.work: Path | None = None
        self._scratch = contextlib.ExitStack()  # removed also where this process is killed

    def __enter__(self) -> Path | None:
        if self.final is not None:
            try:
                self.final.parent.mkdir(parents=True, exist_ok=True)
                self.work = self._scratch.enter_context(scratch(".tokenising-", self.final.parent))
            except OSError as error:
                raise FastFTError(
                    f"the data cache {self.final.parent} cannot be written: {error}."
                ) from error
        return self.work

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.work is None or self.final is None:
            return
        try:
            with self._scratch:
                if kind is not None:
                    return
                put_in_place(self.work, self.final)
                flush(self.final.parent)
        except OSError as error:
            raise CouldNotFinishError(
                f"the data cache {self.final} could not be written: {error}. Make room, or set "
                "FASTFT_CACHE to another disk."
            ) from error


def write(work: Path, datasets: Mapping[str, TokenDataset | None], values: Any) -> None:
    """Write the index of a work folder and, last, the manifest."""
    stores = {}
    for name, dataset in datasets.items():
        if dataset is not None:
            assert dataset.folder is not None
            stores[name] = dataset.folder.name
            np.save(work / f"{name}.order.npy", dataset.order)
    (work / _INDEX).write_text(
        json.dumps({"stores": stores, "values": values}, ensure_ascii=False), encoding="utf-8"
    )
    files = sorted(path for path in work.rglob("*") if path.is_file())
    entries = {
        str(path.relative_to(work)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in files
    }
    (work / _MANIFEST).write_text(json.dumps({"files": entries}, indent=1), encoding="utf-8")


def problem(folder: Path) -> str | None:
    """Return what is wrong with a folder of the cache; None where it is whole."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
            if sha256(path) != entry["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def read(folder: Path) -> tuple[dict[str, TokenDataset], Any]:
    """Return the datasets and values of a whole folder."""
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    datasets = {
        name: open_folder(folder / store)[np.load(folder / f"{name}.order.npy")]
        for name, store in index["stores"].items()
    }
    return datasets, index["values"]
