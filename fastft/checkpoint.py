"""Checkpoints that are whole or absent: written aside, hashed, renamed; resumed only where they match.

A checkpoint folder gets its manifest (sha256 and size of each file) last, and its name last of all. What a
killed process leaves behind is a folder with a temporary name, which nobody takes for a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastft.config import RunConfig
from fastft.errors import CouldNotFinishError, FastFTError

MANIFEST = "manifest.json"
# Without any one of these a resume silently starts the optimizer or the schedule anew.
REQUIRED = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
MAY_CHANGE = {
    "train": {"epochs", "max_steps", "max_minutes", "report_to"}
    | {"logging_steps", "save_steps", "save_total_limit", "eval_steps"},
}
MAY_CHANGE_SECTIONS = {"mirror", "export", "output_dir", "project"}


def seal(folder: Path, final: Path) -> None:
    """Make `folder` (written under a temporary name) into `final`: manifest, flush to disk, rename."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
    entries = {str(p.relative_to(folder)): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files}
    write_atomically(folder / MANIFEST, json.dumps({"files": entries}, indent=1))
    for path in files:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(folder, final)
    _flush(final.parent)


def what_is_wrong(folder: Path, required: tuple[str, ...] = REQUIRED) -> str | None:
    """Return why `folder` is no whole checkpoint (missing, truncated or changed files), or None where it is."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it has no manifest"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "its manifest is damaged"
    for name in required:
        if name not in entries:
            return f"{name} is not part of it"
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
        if sha256(path) != entry["sha256"]:
            return f"{name} was changed (its sha256 differs)"
    return None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the folders that are named like checkpoints, oldest first; not yet verified."""
    found = [
        (int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return sorted(found)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return (newest whole checkpoint or None, a warning for each damaged one that was passed over)."""
    warnings: list[str] = []
    for _, path in reversed(checkpoints(folder)):
        problem = what_is_wrong(path)
        if problem is None:
            return path, warnings
        warnings.append(f"checkpoint {path.name} is damaged ({problem}); the one before it is taken")
    return None, warnings


def prune(folder: Path, keep: int, protected: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and the `protected` steps; leftovers of killed writes too."""
    for path in folder.glob(".writing-*"):
        shutil.rmtree(path)
    found = checkpoints(folder)
    for step, path in found[: max(0, len(found) - keep)]:
        if step not in protected:
            # Renamed first, so that a kill in the middle leaves nothing that is named like a checkpoint.
            doomed = path.with_name(f".writing-pruned-{step}")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def refuse_differences(before: dict[str, Any], config: RunConfig) -> None:
    """Raise FastFTError naming every setting that differs from the run's and may not change on resume."""
    now = config.model_dump()
    lines = []
    for section, values in now.items():
        if section in MAY_CHANGE_SECTIONS:
            continue
        old = before.get(section, {})
        for key, value in values.items():
            if key not in MAY_CHANGE.get(section, set()) and key in old and old[key] != value:
                lines.append(f"  - {section}.{key} was {old[key]!r}, is now {value!r}")
    if lines:
        raise FastFTError(
            f"the run in {config.run_dir} was started with other settings:\n"
            + "\n".join(lines)
            + "\nPut them back to go on, or start a new run with another project name."
        )


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock; raises FastFTError naming the process that has it. A dead holder's lock is taken over."""
    path = run_dir / ".lock"
    with _writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    try:
        _lock(handle)
    except OSError as error:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        raise FastFTError(
            f"{run_dir} is being trained by {holder}. Wait for it, stop it, or use another project name."
        ) from error
    try:
        handle.seek(0)
        handle.truncate()
        handle.write(f"process {os.getpid()}")
        handle.flush()
        yield
    finally:
        handle.close()  # releases the lock; the kernel does so too where the process is killed


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.writing")
    with _writing(path.parent):
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Return the hex sha256 of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise FastFTError(
            f"{folder} cannot be written: permission denied. Set output_dir to a folder of yours."
        ) from error
    except NotADirectoryError as error:
        raise FastFTError(f"{folder} cannot be made: a file stands in the way.") from error
    except FileExistsError as error:
        raise FastFTError(f"{folder} cannot be made: a file of that name exists.") from error
    except OSError as error:
        raise disk_error(error, folder) from error


def disk_error(error: OSError, folder: Path) -> CouldNotFinishError:
    """Return the clear form of an OSError while writing: how much is free and what to do."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    return CouldNotFinishError(
        f"could not write below {folder}: {error.strerror or error} ({free / 2**20:,.0f} MiB free). The last checkpoint is "
        "whole. Make room or set output_dir to another disk, then run the same command again."
    )


def _flush(path: Path) -> None:
    """Have the kernel put `path` on the disk, so that a power cut does not undo the rename's order."""
    with contextlib.suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(handle: Any) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
