"""The mirror: verified copies of a run in another folder (Google Drive), made while training goes
on.

MIRROR/PROJECT/
  checkpoints/checkpoint-N/ + manifest.json     final/     export/
  run.yaml run.json log.jsonl ... manifest.json

A copy is written under a temporary name, read back, compared by hash, and renamed; its manifest
comes last. Older copies are deleted only after a newer one was verified. A mirror that is slow,
full, read-only, gone or lying never stops training: it is said once, and tried again at the next
checkpoint. Each checkpoint holds all that is needed to go on from an empty disk
(`RunFolder.keep_state`).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.files import LOCAL, Files
from fastft.runs import checkpoint
from fastft.runs.checkpoint import MANIFEST, REQUIRED, read_manifest
from fastft.runs.folder import STATE, RunFolder, best_step

SMALL = (*STATE, "report.md", "loss.png")
ADAPTER = ("adapter_model.safetensors",)
RETRY_AFTER_SECONDS = (0.5, 2.0)
STALL_SECONDS = 60.0
FLUSH_SECONDS = 600.0
INTERRUPTED_FLUSH_SECONDS = 60.0  # whoever sends SIGTERM or presses Ctrl-C does not wait long
SPARE_BYTES = 2**20


class CopyDiffersError(OSError):
    """What was read back from the mirror is not what was written."""


class DamagedError(OSError):
    """What was to be copied is not whole."""


class GivenUpError(OSError):
    """Nobody waits for this work any more."""


@dataclass(frozen=True)
class Wanted:
    """What the mirror should contain: the newest checkpoint, at most `keep` in total, all
    `protected` steps; after the run, everything.
    """

    number: int
    keep: int
    protected: frozenset[int]
    everything: bool


class Mirror:
    """Keeps `folder` a verified copy of `run`, from a thread of its own.

    `restore` before training, `request` after each checkpoint (returns at once), `close` at the
    end (bounded).
    """

    def __init__(
        self,
        run: RunFolder,
        folder: Path,
        *,
        note: Callable[[str], None],
        warn: Callable[[str], None],
        files: Files = LOCAL,
        stall_seconds: float = STALL_SECONDS,
        retry_after_seconds: tuple[float, ...] = RETRY_AFTER_SECONDS,
    ) -> None:
        self.run, self.folder, self.note, self.warn, self.files = run, folder, note, warn, files
        self.stall_seconds, self.retry_after_seconds = stall_seconds, retry_after_seconds
        # steps whose copy was read back by this process and is still listed
        self.verified: set[int] = set()
        self.copied_bytes = 0
        self.blocked_seconds = 0.0  # that training waited
        self.cpu_seconds = 0.0  # of the copying thread
        self.copy_seconds: list[float] = []  # of each checkpoint, from the first byte to the rename
        self.problems = 0
        self.problem: str | None = None  # why the mirror is behind now
        self._copying: set[int] = set()
        self._changed = threading.Condition()
        # until told otherwise, nothing is deleted there
        self._wanted = Wanted(0, sys.maxsize, frozenset(), False)
        self._finished = 0
        self._moved = time.monotonic()
        self._given_up = self._closing = False
        self._thread: threading.Thread | None = None

    # --- called by training

    @property
    def copying(self) -> set[int]:
        """Steps whose local checkpoint is being read now and must not be deleted."""
        return set(self._copying)

    def request(self, keep: int, protected: Iterable[int] = (), *, everything: bool = False) -> int:
        """Ask for a copy of the newest checkpoint and return at once; a slow mirror skips those in
        between.
        """
        began = time.perf_counter()
        with self._changed:
            self._wanted = Wanted(self._wanted.number + 1, keep, frozenset(protected), everything)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="fastft-mirror", daemon=True)
            self._thread.start()
        self.blocked_seconds += time.perf_counter() - began
        return self._wanted.number

    def close(self, seconds: float = FLUSH_SECONDS) -> bool:
        """Copy what is left, final/ and export/ too, for at most `seconds`; returns whether the
        mirror holds it all.
        """
        began = time.monotonic()
        wanted, self._moved = self._wanted, began
        number = self.request(wanted.keep, wanted.protected, everything=True)
        self.note(f"mirror: bringing {self.folder} up to date (at most {seconds:.0f} s)")
        while not self._wait_for(number, min(5.0, seconds)):
            waited, stalled = time.monotonic() - began, time.monotonic() - self._moved
            if waited > seconds or stalled > min(self.stall_seconds, seconds) or not self._alive():
                self.problem = (
                    f"it did not answer for {stalled:.0f} s"
                    if stalled > 5
                    else f"not done after {waited:.0f} s"
                )
                break
            self.note(
                f"mirror: {self.copied_bytes / 2**20:,.0f} MiB copied in all, {waited:.0f} s "
                f"of at most {seconds:.0f} s"
            )
        self._closing, self._given_up = True, self.problem is not None
        with self._changed:
            self._changed.notify_all()
        self._say_how_it_stands()
        return self.problem is None

    def facts(self) -> dict[str, Any]:
        """Return what run.json keeps of the mirror."""
        return {
            "folder": str(self.folder),
            "verified_steps": sorted(self.verified.copy()),
            "copied_bytes": self.copied_bytes,
            "seconds_blocked": round(self.blocked_seconds, 4),
            "seconds_cpu": round(self.cpu_seconds, 3),
            "seconds_copying": [round(s, 3) for s in self.copy_seconds],
            "problems": self.problems,
            "behind_because": self.problem,
        }

    def restore(self) -> None:
        """Where the mirror's newest whole checkpoint is newer than the run's own, bring it (and
        the best one) here.

        Raises FastFTError where the mirror holds another run of this name, or cannot be read
        although the run has nothing of its own: a new run would then be started over an old one.
        """
        own, _ = checkpoint.newest_whole(self.run.checkpoints)
        problem: list[OSError] = []

        # Another object with the same folders: one that hangs is given up, and this one goes on.
        reader = copy.copy(self)

        def work() -> None:
            try:
                reader._restore(checkpoint.step_of(own) if own else 0)
            except OSError as error:
                problem.append(error)

        finished, raised = reader._watched(work)
        if raised is not None:
            raise raised
        if finished and not problem:
            return
        why = (
            _explain(problem[0]) if problem else f"it did not answer for {self.stall_seconds:.0f} s"
        )
        if own is None and not self.run.has_record():
            raise FastFTError(
                f"the mirror {self.folder} cannot be read ({why}), and the run has nothing of "
                "its own yet, so nobody knows "
                "whether it was started before. Mount it and check the path, or set mirror: "
                "null for a run without it."
            )
        self.warn(
            f"mirror: {self.folder} cannot be read ({why}); going on with the run's own checkpoints"
        )

    # --- from the mirror to the run

    def _restore(self, own: int) -> None:
        self.files.make_folder(self.folder.parent)  # raises where the drive is not mounted
        steps = self._steps_there()
        if not steps:
            self._refuse_what_is_no_mirror()
            return
        self._refuse_another_run()
        newest = self._fetch_newest([step for step in steps if step > own])
        if newest is None:
            return
        self.note(
            f"mirror: {self.folder} is ahead; its checkpoint of step {newest} was verified "
            "and copied here"
        )
        self._fetch_best(newest, steps)
        self._fetch_finished(newest)

    def _steps_there(self) -> list[int]:
        """Return the steps that the mirror seems to have, oldest first: by its listing, and by its
        last manifest.
        """
        try:
            names = self.files.names(self.folder / "checkpoints")
        except (FileNotFoundError, NotADirectoryError):
            names = []
        steps = {int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint-(\d+)", name))}
        return sorted(
            steps
            | {step for step in self._manifest().get("checkpoints", []) if isinstance(step, int)}
        )

    def _refuse_another_run(self) -> None:
        try:
            here = self.run.read_record()
            there = json.loads(b"".join(self.files.read(self.folder / "run.json")))
        except (FastFTError, FileNotFoundError, ValueError):
            return
        keys = ("run_id", "started")
        known = isinstance(there, dict) and all(
            isinstance(r.get("run_id"), str) for r in (here, there)
        )
        if known and here["run_id"] != there["run_id"]:
            theirs, ours = ({key: record.get(key) for key in keys} for record in (there, here))
            raise FastFTError(
                f"the mirror {self.folder} holds another run of this name (id "
                f"{theirs['run_id']}, started {theirs['started']}; "
                f"this one: id {ours['run_id']}, started {ours['started']}). Use another "
                "project name, or move that folder away."
            )

    def _refuse_what_is_no_mirror(self) -> None:
        """Raise FastFTError where the folder holds what a mirror would replace, and no run's
        record.
        """
        try:
            names = set(self.files.names(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        found = sorted(names & {"final", "report.md", "loss.png"})
        if found and "run.json" not in names:
            raise FastFTError(
                f"the mirror {self.folder} is no copy of a run, but holds {', '.join(found)}, "
                "which a copy would replace. Use another mirror or project name, or move that away."
            )

    def _fetch_newest(self, steps: list[int]) -> int | None:
        for step in sorted(steps, reverse=True):
            if self._fetch_checkpoint(step, "the one before it is taken"):
                return step
        return None

    def _fetch_checkpoint(self, step: int, otherwise: str) -> bool:
        name = f"checkpoint-{step}"
        for folder in (self.run.path, self.run.checkpoints):
            LOCAL.make_folder(folder)
        try:
            self._copy_sealed(
                self.files,
                self.folder / "checkpoints" / name,
                LOCAL,
                self.run.checkpoints / name,
                REQUIRED,
            )
            return True
        except (DamagedError, FileNotFoundError) as error:
            self.warn(f"mirror: {name} there is damaged ({_explain(error)}); {otherwise}")
            return False

    def _fetch_best(self, newest: int, steps: list[int]) -> None:
        """Bring the checkpoint with the lowest held-out loss too: the end of the run may want it
        for final/.
        """
        path = self.run.checkpoints / f"checkpoint-{newest}" / "run"
        best = best_step(
            [record for record in RunFolder(path).read_log() if record["step"] <= newest]
        )
        if best is not None and best != newest and best in steps:
            local = self.run.checkpoints / f"checkpoint-{best}"
            if checkpoint.what_is_wrong(local) is not None:
                self._fetch_checkpoint(
                    best, "it had the lowest held-out loss so far; another will stand in for it"
                )

    def _fetch_finished(self, newest: int) -> None:
        """Bring final/ and the record of a run that was done when it was copied."""
        contents = {}
        for name, entry in self._manifest().get("files", {}).items():
            if name not in SMALL:
                continue
            contents[name] = b"".join(self.files.read(self.folder / name))
            if hashlib.sha256(contents[name]).hexdigest() != entry["sha256"]:
                return
        if not contents.keys() >= set(STATE):
            return
        record = json.loads(contents["run.json"])
        if record.get("status") != "done" or record.get("steps") != newest:
            return
        try:
            self._copy_sealed(self.files, self.folder / "final", LOCAL, self.run.final, ADAPTER)
        except (DamagedError, FileNotFoundError):
            return  # the run goes on from its last checkpoint and writes final/ again
        for name, content in contents.items():
            LOCAL.write(self.run.path / f".{name}.writing", [content])
            os.replace(self.run.path / f".{name}.writing", self.run.path / name)

    # --- from the run to the mirror, in the thread

    def _work(self) -> None:
        _give_way()
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._wanted.number > self._finished or self._closing
                )
                if self._wanted.number == self._finished or self._given_up:
                    return
                wanted = self._wanted
            self._try(wanted)
            with self._changed:
                self._finished = wanted.number
                self.cpu_seconds = time.thread_time()
                self._changed.notify_all()

    def _try(self, wanted: Wanted) -> None:
        """Do what is wanted, a few times; say once what is in the way."""
        for pause in (*self.retry_after_seconds, None):
            try:
                self._moved = time.monotonic()
                self._sync(wanted)
            except GivenUpError:
                return
            except OSError as error:
                if pause is None:
                    self._say_problem(_explain(error))
                    return
                time.sleep(pause)
            else:
                if self.problem is not None:
                    self.note(
                        f"mirror: {self.folder} works again; step "
                        f"{max(self.verified, default=0)} is verified there"
                    )
                self.problem = None
                return

    def _sync(self, wanted: Wanted) -> None:
        for folder in (self.folder.parent, self.folder, self.folder / "checkpoints"):
            self.files.make_folder(folder)
        files = self._copy_small(wanted.everything)
        self._copy_checkpoints(wanted)
        self._write_manifest(files)
        self._prune(wanted)
        if wanted.everything:
            self._copy_final()
            files |= self._copy_export()
            self._write_manifest(files)

    def _copy_checkpoints(self, wanted: Wanted) -> None:
        """Copy the newest checkpoint, then those that are protected, where they are not there and
        verified yet.
        """
        listed = set(self._listed())
        self.verified &= listed
        for leftover in self._leftovers():
            self.files.remove(self.folder / "checkpoints" / leftover)
        with self._changed:  # training deletes nothing of what is in `_copying`
            here = dict(checkpoint.checkpoints(self.run.checkpoints))
            steps = [max(here), *sorted(wanted.protected & here.keys())] if here else []
            self._copying = set(steps)
        try:
            for step in dict.fromkeys(steps):
                if step not in self.verified and not (
                    step in listed and self._is_there(here[step])
                ):
                    self._copy_checkpoint(here[step])
                self.verified.add(step)
        finally:
            self._copying = set()

    def _is_there(self, local: Path) -> bool:
        """Whether the mirror's copy of this very checkpoint is whole; read to the last byte."""
        there = self.folder / "checkpoints" / local.name
        try:
            same = b"".join(self.files.read(there / MANIFEST)) == b"".join(
                LOCAL.read(local / MANIFEST)
            )
        except FileNotFoundError:
            return False
        return same and checkpoint.what_is_wrong(there, files=self.files) is None

    def _copy_checkpoint(self, local: Path) -> None:
        began = time.perf_counter()
        self._refuse_without_room(local)
        self._copy_sealed(
            LOCAL, local, self.files, self.folder / "checkpoints" / local.name, REQUIRED
        )
        self.copy_seconds.append(time.perf_counter() - began)

    def _refuse_without_room(self, local: Path) -> None:
        needed = (
            sum(path.stat().st_size for path in local.rglob("*") if path.is_file()) + SPARE_BYTES
        )
        free = self.files.free_bytes(self.folder)
        if needed > free:
            numbers = f"{needed / 2**20:,.1f} MiB are needed, {free / 2**20:,.1f} MiB are free"
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({numbers})")

    def _prune(self, wanted: Wanted) -> None:
        """Delete what is older than the newest verified copy, but for `keep` in all and the
        protected ones.
        """
        if not self.verified:
            return
        older = [step for step in self._listed() if step < max(self.verified)]
        for step in older[: max(0, len(older) - (wanted.keep - 1))]:
            if step not in wanted.protected:
                doomed = self.folder / "checkpoints" / f".writing-pruned-{step}"
                self.files.rename(self.folder / "checkpoints" / f"checkpoint-{step}", doomed)
                self.files.remove(doomed)
                self.verified.discard(step)

    def _copy_small(self, everything: bool) -> dict[str, Any]:
        """Copy the run's own small files; returns the mirror's {file: {"sha256", "bytes"}}."""
        known = self._manifest().get("files", {})
        for name in SMALL:
            if (self.run.path / name).is_file():
                known[name] = self._copy_file(
                    self.run.path / name, self.folder / name, known.get(name)
                )
        return known

    def _copy_final(self) -> None:
        if not (self.run.final / MANIFEST).is_file():
            return
        there = self.folder / "final"
        try:
            same = (
                b"".join(self.files.read(there / MANIFEST))
                == (self.run.final / MANIFEST).read_bytes()
            )
        except FileNotFoundError:
            same = False
        if not (same and checkpoint.what_is_wrong(there, ADAPTER, self.files) is None):
            self._copy_sealed(LOCAL, self.run.final, self.files, there, ADAPTER)

    def _copy_export(self) -> dict[str, Any]:
        """Copy the exported files; nothing is deleted there."""
        known, copied = self._manifest().get("files", {}), {}
        if not self.run.export.is_dir():
            return {}
        for path in sorted(self.run.export.rglob("*")):
            relative = path.relative_to(self.run.path)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                self._make_folders(self.files, self.folder, relative.parent)
                name = relative.as_posix()
                copied[name] = self._copy_file(path, self.folder / relative, known.get(name))
        return copied

    def _copy_file(
        self, source: Path, target: Path, known: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Copy a file that is not there as it is here; returns its {"sha256", "bytes"}."""
        if known is not None and LOCAL.digest(source) == (known.get("sha256"), known.get("bytes")):
            with contextlib.suppress(FileNotFoundError):
                if self.files.size(target) == known["bytes"]:
                    return known
        aside = target.with_name(f".writing-{target.name}")
        sha256, size = self._transfer(LOCAL, source, self.files, aside)
        self.files.rename(aside, target)
        return {"sha256": sha256, "bytes": size}

    def _write_manifest(self, files: dict[str, Any]) -> None:
        content = json.dumps(
            {"files": files, "checkpoints": sorted(self.verified)}, indent=1
        ).encode()
        aside = self.folder / f".writing-{MANIFEST}"
        self.files.write(aside, [content])
        if self.files.digest(aside)[0] != hashlib.sha256(content).hexdigest():
            raise CopyDiffersError(f"{MANIFEST} read back differs from what was written")
        self.files.rename(aside, self.folder / MANIFEST)

    def _manifest(self) -> dict[str, Any]:
        """Return the mirror's own manifest, {} where there is none or it is damaged: everything is
        then copied again.
        """
        try:
            content = b"".join(self.files.read(self.folder / MANIFEST))
            read_manifest(content)
            return json.loads(content)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}

    def _listed(self) -> list[int]:
        names = self.files.names(self.folder / "checkpoints")
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"checkpoint-(\d+)", name)))

    def _leftovers(self) -> list[str]:
        return [
            name
            for name in self.files.names(self.folder / "checkpoints")
            if name.startswith(".writing-")
        ]

    # --- copying, either way

    def _copy_sealed(
        self,
        from_files: Files,
        source: Path,
        to_files: Files,
        target: Path,
        required: tuple[str, ...],
    ) -> None:
        """Copy a sealed folder under a temporary name, verified both where it is read and where it
        is written.
        """
        manifest = b"".join(from_files.read(source / MANIFEST))
        try:
            entries = read_manifest(manifest)
        except ValueError as error:
            raise DamagedError("its manifest is damaged") from error
        missing = [name for name in required if name not in entries]
        if missing:
            raise DamagedError(f"{missing[0]} is not part of it")
        aside = target.with_name(f".writing-{target.name}")
        to_files.remove(aside)
        to_files.make_folder(aside)
        for name, entry in entries.items():
            self._make_folders(to_files, aside, Path(name).parent)
            sha256, size = self._transfer(from_files, source / name, to_files, aside / name)
            if (sha256, size) != (entry["sha256"], entry["bytes"]):
                what = (
                    "was changed"
                    if size == entry["bytes"]
                    else f"has {size:,} of {entry['bytes']:,} bytes"
                )
                to_files.remove(aside)
                raise DamagedError(f"{name} {what}")
        to_files.write(aside / MANIFEST, [manifest])
        self._put_in_place(to_files, aside, target)
        if b"".join(to_files.read(target / MANIFEST)) != manifest:
            raise CopyDiffersError(f"{MANIFEST} read back differs from what was written")

    def _put_in_place(self, files: Files, aside: Path, target: Path) -> None:
        old = target.with_name(f".writing-old-{target.name}")
        files.remove(old)
        with contextlib.suppress(FileNotFoundError):
            files.rename(target, old)
        files.rename(aside, target)
        files.remove(old)

    def _transfer(
        self, from_files: Files, source: Path, to_files: Files, target: Path
    ) -> tuple[str, int]:
        """Copy one file, read it back, and return (sha256, bytes) of what the source said."""
        sha256, size = hashlib.sha256(), 0

        def chunks() -> Iterator[bytes]:
            nonlocal size
            for chunk in from_files.read(source):
                if self._given_up:
                    raise GivenUpError("nobody waits for this copy any more")
                sha256.update(chunk)
                size += len(chunk)
                self._moved = time.monotonic()
                yield chunk

        to_files.write(target, chunks())
        digest, there = to_files.digest(target)
        if (digest, there) != (sha256.hexdigest(), size):
            what = f"{there:,} of {size:,} bytes" if there != size else "other bytes"
            raise CopyDiffersError(
                f"{target.name.removeprefix('.writing-')} was written, but {what} came back"
            )
        self._moved = time.monotonic()
        self.copied_bytes += size
        return digest, size

    def _make_folders(self, files: Files, root: Path, relative: Path) -> None:
        for part in [*reversed(relative.parents), relative]:
            if part != Path("."):
                files.make_folder(root / part)

    # --- waiting and saying

    def _watched(self, work: Callable[[], None]) -> tuple[bool, Exception | None]:
        """Run `work` in a thread and wait while bytes move; returns (whether it ended, a
        FastFTError that it raised).
        """
        raised: list[Exception] = []

        def run() -> None:
            try:
                work()
            except FastFTError as error:
                raised.append(error)

        self._moved = time.monotonic()
        thread = threading.Thread(target=run, name="fastft-mirror-restore", daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() - self._moved < self.stall_seconds:
            thread.join(0.05)
        if thread.is_alive():
            self._given_up = True  # what hangs now must not write into the run later
        return not thread.is_alive(), raised[0] if raised else None

    def _wait_for(self, number: int, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._finished >= number, seconds)

    def _alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _say_problem(self, why: str) -> None:
        self.problems += 1
        if self.problem != why:
            newest = (
                f"the newest whole copy there is step {max(self.verified)}"
                if self.verified
                else "nothing is there yet"
            )
            self.warn(
                f"mirror: {self.folder}: {why}. Training goes on; {newest}. It is tried again "
                "at the next checkpoint."
            )
        self.problem = why

    def _say_how_it_stands(self) -> None:
        newest = max(self.verified.copy(), default=None)
        if self.problem is None:
            self.note(
                f"mirror: {self.folder} is up to date"
                + (f" (step {newest} verified)" if newest is not None else "")
            )
            return
        has = f"has step {newest}" if newest is not None else "has nothing verified"
        self.warn(
            f"mirror: {self.folder} is behind: it {has}; {self.problem}. The run itself is "
            f"whole in {self.run.path}; the "
            "same command brings the mirror up to date once it works again."
        )


def follow(run: RunFolder, *, note: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Bring the mirror of a run up to date after an export or a certificate; nothing happens where
    the run has none.

    The mirror's path stands in the run's own run.yaml, which may come from somebody else: only a
    folder that `fastft train` has made the mirror of this very run is written to.
    """
    config = run.read_config()
    if config.mirror is None:
        return
    folder = Path(config.mirror).expanduser().absolute() / config.project
    if not _mirrors(folder, run):
        note(
            f"mirror: {folder} holds no mirror of this run, so nothing is copied there; fastft "
            "train makes one"
        )
        return
    Mirror(run, folder, note=note, warn=warn).close()


def _mirrors(folder: Path, run: RunFolder) -> bool:
    """Whether `folder` holds a copy of the run with this run's id."""
    try:
        there = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    ours = run.read_record().get("run_id")
    return isinstance(there, dict) and ours is not None and there.get("run_id") == ours


def _explain(error: OSError) -> str:
    """Return what is wrong with the mirror, and what to do."""
    what = error.strerror or str(error)
    if isinstance(error, CopyDiffersError):
        return f"{what}; the drive does not keep what is written to it"
    if isinstance(error, DamagedError):
        return what
    fixes = {
        errno.ENOSPC: "make room there, or lower train.save_total_limit",
        errno.EDQUOT: "make room there, or lower train.save_total_limit",
        errno.EROFS: "mount it writable",
        errno.EACCES: "give yourself the right to write there",
        errno.EPERM: "give yourself the right to write there",
        errno.ENOENT: "the folder is gone; is the drive still mounted?",
        errno.ENOTCONN: "is the drive still mounted?",
    }
    name = f" ({Path(error.filename).name})" if error.filename else ""
    return f"{what}{name}; {fixes[error.errno]}" if error.errno in fixes else f"{what}{name}"


def _give_way() -> None:
    """Let training have the processor first (Linux: niceness is a thread's own)."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
