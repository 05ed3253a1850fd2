"""Checkpoints that are whole or absent: written aside, hashed, renamed; resumed only where they
match.

A checkpoint folder gets its manifest (sha256 and size of each file) last, and its name last of
all. What a killed process leaves behind is a folder with a temporary name, which nobody takes for
a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastft.config import RunConfig
from fastft.errors import FastFTError
from fastft.files import (
    LOCAL,
    Files,
    clear_errors,
    put_in_place,
    recover,
    sha256,
    write_atomically,
    written_aside,
)
from fastft.files.locks import held

MANIFEST = "manifest.json"
# Without any one of these a resume silently starts the optimizer or the schedule anew.
REQUIRED = (
    "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json",
)  # fmt: skip
MAY_CHANGE = {
    "train": {"epochs", "max_steps", "max_minutes", "report_to", "lost_after_minutes", "shard_base"}
    | {"logging_steps", "save_steps", "save_total_limit", "eval_steps", "eval_metrics"}
    # How a step is computed, not what it learns: what an out-of-memory message advises.
    | {"micro_batch_tokens", "gradient_checkpointing", "prefetch"},
}
# Compared by their content: the base's fingerprint, the data's.
MAY_MOVE = {"model": {"name"}, "data": {"source", "eval_source", "chat_template"}}
MAY_CHANGE_SECTIONS = {"mirror", "export", "output_dir", "project"}


def seal(folder: Path, final: Path) -> None:
    """Make `folder` (written under a temporary name) into `final`: manifest, flush to disk,
    rename.

    What somebody else put into a `final` that is replaced is carried over.
    """
    write_manifest(folder)
    recover(final)
    put_in_place(folder, final, _written_here(final).__contains__)


@contextlib.contextmanager
def sealed(final: Path) -> Iterator[Path]:
    """Yield a name beside `final` for a folder that becomes it, with a manifest; an OSError becomes
    a clear message. What somebody else put into a `final` that is replaced is carried over.
    """
    with clear_errors(final.parent):
        recover(final)
        with written_aside(final, _written_here(final).__contains__) as aside:
            yield aside
            write_manifest(aside)


def write_manifest(folder: Path) -> None:
    """Write the sha256 and the size of each file in `folder` into its manifest."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    entries = {
        str(p.relative_to(folder)): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files
    }
    write_atomically(folder / MANIFEST, json.dumps({"files": entries}, indent=1))


def _written_here(folder: Path) -> set[str]:
    """Return the names in a sealed folder's manifest; only its own where that cannot be read."""
    try:
        return {MANIFEST, *read_manifest((folder / MANIFEST).read_bytes())}
    except (OSError, ValueError):
        return {MANIFEST}


def what_is_wrong(
    folder: Path, required: tuple[str, ...] = REQUIRED, files: Files = LOCAL
) -> str | None:
    """Return why `folder` is no whole checkpoint (missing, truncated or changed files), or None
    where it is.
    """
    try:
        entries = read_manifest(b"".join(files.read(folder / MANIFEST)))
    except (FileNotFoundError, NotADirectoryError):
        return "it has no manifest"
    except OSError as error:
        return f"its manifest cannot be read: {error.strerror or error}"
    except ValueError:
        return "its manifest is damaged"
    for name in required:
        if name not in entries:
            return f"{name} is not part of it"
    for name, entry in entries.items():
        try:
            size = files.size(folder / name)
            if size != entry["bytes"]:
                return f"{name} has {size:,} bytes instead of {entry['bytes']:,}"
            if files.digest(folder / name)[0] != entry["sha256"]:
                return f"{name} was changed (its sha256 differs)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def read_manifest(content: bytes) -> dict[str, dict[str, Any]]:
    """Return {file: {"sha256", "bytes"}} of a manifest's content; raises ValueError where it is
    none.
    """
    try:
        entries = json.loads(content.decode("utf-8"))["files"]
        for name, entry in entries.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name} lies outside the folder")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"{name} has no size or no hash")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it has not the form of a manifest: {error}") from error
    return entries


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the folders that are named like checkpoints, oldest first; not yet
    verified.
    """
    found = [
        (int(m[1]), path)
        for path in folder.glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return sorted(found)


def step_of(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(path.name.split("-")[1])


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return (newest whole checkpoint or None, a warning for each damaged one that was passed
    over).
    """
    warnings: list[str] = []
    for _, path in reversed(checkpoints(folder)):
        problem = what_is_wrong(path)
        if problem is None:
            return path, warnings
        warnings.append(
            f"checkpoint {path.name} is damaged ({problem}); the one before it is taken"
        )
    return None, warnings


def prune(folder: Path, keep: int, protected: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and the `protected` steps; leftovers of killed
    writes too.
    """
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path)
    found = checkpoints(folder)
    for step, path in found[: max(0, len(found) - keep)]:
        if step not in protected:
            # Renamed first, so that a kill in the middle leaves nothing that is named like a
            # checkpoint.
            doomed = path.with_name(f".writing-pruned-{step}")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def refuse_differences(before: dict[str, Any], config: RunConfig) -> list[str]:
    """Raise FastFTError naming every setting that differs from the run's and may not change on
    resume.

    Returns a line for each path that differs: another machine has other paths, and what lies there
    is compared by its fingerprint.
    """
    now = config.model_dump()
    lines: list[str] = []
    moved: list[str] = []
    for section, values in now.items():
        if section in MAY_CHANGE_SECTIONS:
            continue
        old = before.get(section, {})
        for key, value in values.items():
            if key in MAY_CHANGE.get(section, set()) or key not in old or old[key] == value:
                continue
            line = f"{section}.{key} was {old[key]!r}, is now {value!r}"
            may_move = key in MAY_MOVE.get(section, set()) and old[key] and value
            if (section, key) == ("data", "sources"):
                may_move = _without_paths(old[key]) == _without_paths(value)
            (moved if may_move else lines).append(line)
    if lines:
        raise FastFTError(
            f"the run in {config.run_dir} was started with other settings:\n"
            + "\n".join(f"  - {line}" for line in lines)
            + "\nPut them back to go on, or start a new run with another project name."
        )
    return moved


def _without_paths(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return several sources without where they lie, which may differ on another machine."""
    paths = MAY_MOVE["data"]
    return [{k: v for k, v in source.items() if k not in paths} for source in sources]


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock; raises FastFTError naming the process that has it. A dead holder's lock
    is taken over.
    """
    with clear_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)

    def busy(holder: str) -> FastFTError:
        return FastFTError(
            f"{run_dir} is being trained by {holder}. Wait for it, stop it, or use another "
            "project name."
        )

    with held(run_dir / ".lock", busy):
        yield
