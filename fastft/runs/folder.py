"""A run's folder on disk: its config, its record, its log, its plots. Reading needs neither torch
nor transformers.

OUTPUT_DIR/PROJECT/
  run.yaml      the config as resolved        run.json   versions, hardware, choices, results
  log.jsonl     one line a step               loss.png   report.md
  checkpoints/  checkpoint-N/ + manifest      final/     the adapter          export/
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.config import RunConfig, dump_config, make_config, read_yaml
from fastft.errors import FastFTError
from fastft.files import ours, write_atomically, written_aside
from fastft.hardware import installed
from fastft.runs import checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = (
    "fastft", "unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "datasets",
    "accelerate", "bitsandbytes",
)  # fmt: skip

# What a checkpoint keeps of its run, so that it alone is enough to go on from an empty disk.
STATE = ("run.yaml", "run.json", "log.jsonl", "samples.jsonl")
INITIAL_ADAPTER = "initial_adapter"


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and the small files in it."""

    path: Path
    writes: bool = True
    """False in a process that is not the first of several: it reads, and changes nothing."""

    @property
    def checkpoints(self) -> Path:
        """Where checkpoint-N folders lie."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The trained adapter; a peft adapter folder."""
        return self.path / "final"

    @property
    def samples(self) -> Path:
        """Held-out sequences, one {"input_ids", "labels"} a line: what certificates are measured
        on.
        """
        return self.path / "samples.jsonl"

    @property
    def export(self) -> Path:
        """Where exports go unless told otherwise."""
        return self.path / "export"

    def write_config(self, config: RunConfig) -> None:
        """Write run.yaml: every default written out, no secrets."""
        if not self.writes:
            return
        write_atomically(self.path / "run.yaml", dump_config(config))

    def read_config(self) -> RunConfig:
        """Return the run's config; raises FastFTError where the folder is no run."""
        path = self.path / "run.yaml"
        if not path.is_file():
            raise FastFTError(f"{self.path} is not a run: it has no run.yaml.")
        return make_config(read_yaml(path), where=str(path))

    def read_record(self) -> dict[str, Any]:
        """Return run.json, or an empty dict before there is one."""
        try:
            record = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            return record
        except FileNotFoundError:
            return {}
        except ValueError as error:  # also what JSON and UTF-8 decoding raise
            raise FastFTError(
                f"{self.path / 'run.json'} is damaged: {error}. Restore it, or start a new project."
            ) from error

    def update_record(self, **values: Any) -> None:
        """Merge `values` into run.json."""
        if not self.writes:
            return
        write_atomically(
            self.path / "run.json",
            json.dumps(self.read_record() | values, indent=1, ensure_ascii=False),
        )

    def refuse_foreign(self) -> None:
        """Raise FastFTError where a new run would replace files that are not fastft's.

        A run.yaml of fastft is what a run leaves that was killed before its first record.
        """
        names = ("report.md", "loss.png", "samples.jsonl")
        found = [name for name in names if (self.path / name).exists()]
        if (self.path / "run.yaml").exists() and not self._wrote_config():
            found.append("run.yaml")
        if found and not self.has_record():
            raise FastFTError(
                f"{self.path} is no run, but holds {', '.join(found)}, which a run would replace. "
                "Use another project name or output_dir, or move what lies there."
            )

    def _wrote_config(self) -> bool:
        """Whether run.yaml reads as fastft writes it: without comments, every default named."""
        try:
            text = (self.path / "run.yaml").read_text(encoding="utf-8")
            return text == dump_config(self.read_config())
        except (OSError, ValueError, FastFTError):
            return False

    def keep_state(self, checkpoint_folder: Path) -> None:
        """Copy what a checkpoint needs beside itself (config, record, log, samples) into its
        `run/`.
        """
        kept = checkpoint_folder / "run"
        kept.mkdir()
        for name in STATE:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, kept / name)
        if (self.path / INITIAL_ADAPTER).is_dir():
            shutil.copytree(self.path / INITIAL_ADAPTER, kept / INITIAL_ADAPTER)

    def repair_state(self, newest: Path | None) -> list[str]:
        """Take from the checkpoint `newest` what is missing or damaged in the folder; returns a
        line for each file.

        A kill cannot damage these files; a full disk, a power cut, a careless editor and an empty
        new machine can.
        """
        if not self.writes:
            return []
        repaired = []
        kept = newest / "run" if newest else None
        problems = {"run.yaml": self._config_problem(), "run.json": self.record_problem()}
        problems["log.jsonl"] = self._log_problem(checkpoint.step_of(newest)) if newest else None
        problems["samples.jsonl"] = (
            None if (self.path / "samples.jsonl").is_file() else "samples.jsonl is missing"
        )
        for name, problem in problems.items():
            if problem and kept and (kept / name).is_file():
                with written_aside(self.path / name) as aside:
                    shutil.copyfile(kept / name, aside)
                repaired.append(f"{problem}; it was taken from {newest.name if newest else ''}")
        if (
            kept
            and (kept / INITIAL_ADAPTER).is_dir()
            and not (self.path / INITIAL_ADAPTER).is_dir()
        ):
            with written_aside(self.path / INITIAL_ADAPTER) as aside:
                shutil.copytree(kept / INITIAL_ADAPTER, aside)
        return repaired

    def has_record(self) -> bool:
        """Whether there is a run.json."""
        return (self.path / "run.json").is_file()

    def is_started(self) -> bool:
        """Whether this folder holds a run. Raises FastFTError where it does, but the record of it
        is gone or damaged.
        """
        problem = self.record_problem()
        if problem:
            raise FastFTError(
                f"{self.path} holds a run, but {problem}, and no checkpoint has a copy. "
                "Restore it, or use another project "
                "name; to start over, delete the folder."
            )
        return self.has_record()

    def record_problem(self) -> str | None:
        """Return what is wrong with run.json, or None; it may be absent only where nothing was
        trained yet.
        """
        try:
            record = self.read_record()
        except FastFTError:
            return "run.json is damaged"
        if self.has_record():
            return None if {"started", "dataset"} <= record.keys() else "run.json is incomplete"
        trained = (self.path / "log.jsonl").is_file() or checkpoint.checkpoints(self.checkpoints)
        return "run.json is missing" if trained or self.final.is_dir() else None

    def _config_problem(self) -> str | None:
        try:
            self.read_config()
        except FastFTError:
            return "run.yaml is missing or damaged"
        return None

    def _log_problem(self, step: int) -> str | None:
        """Return what is wrong with the log of a run whose newest checkpoint is that of `step`."""
        try:
            log = self.read_log()
        except FastFTError:
            return "log.jsonl is damaged"
        return (
            None
            if any(record["step"] >= step for record in log)
            else f"log.jsonl ends before step {step}"
        )

    def append_log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
        if not self.writes:
            return
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """Return the lines of log.jsonl; a last line that a kill cut short is left out."""
        try:
            lines = (self.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        except UnicodeDecodeError as error:
            raise FastFTError(
                f"{self.path / 'log.jsonl'} is damaged: {error}. Delete it to go on without "
                "its plot."
            ) from error
        records = []
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError("it is not a step's record")
                records.append(record)
            except ValueError as error:
                if number < len(lines):
                    raise FastFTError(
                        f"{self.path / 'log.jsonl'} line {number} is damaged: {error}. Delete "
                        "that line to go on."
                    ) from error
        return records

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Drop what was logged after `step` (those steps are done again) and return what is
        left.
        """
        if not self.writes:
            return []
        kept = [record for record in self.read_log() if record["step"] <= step]
        write_atomically(
            self.path / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept)
        )
        return kept

    def plot_loss(self) -> Path | None:
        """Draw loss.png from log.jsonl: training loss, its running mean, held-out loss. None where
        nothing was logged.
        """
        if not self.writes:
            return None
        before = self.read_record().get("eval_loss_before")
        figure = loss_figure(self.read_log(), before, title=self.path.name)
        if figure is None:
            return None
        path = self.path / "loss.png"
        figure.savefig(path, dpi=120, metadata=ours.PNG)
        return path


def loss_figure(log: list[dict[str, Any]], before: float | None, *, title: str) -> Figure | None:
    """Return the loss curves of the lines of log.jsonl; None where nothing was logged.

    `before` is the held-out loss of the untrained model, where it was measured.
    """
    train = [(r["step"], r["loss"]) for r in log if "loss" in r]
    held_out = [(0, before)] if before is not None else []
    held_out += [(r["step"], r["eval_loss"]) for r in log if "eval_loss" in r]
    if not train:
        return None
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training, each step")
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="training, running mean")
    if held_out:
        dots = list(zip(*held_out, strict=True))
        axes.plot(*dots, "o-", color="tab:red", markersize=4, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def best_step(history: list[dict[str, Any]]) -> int | None:
    """Return the step with the best evaluation, the latest of equals; None without evaluations."""
    evaluations = [
        (place_of(record), -record["step"]) for record in history if "eval_loss" in record
    ]
    return -min(evaluations)[1] if evaluations else None


def is_best_so_far(history: list[dict[str, Any]]) -> bool:
    """Whether the latest evaluation is better than every one before it."""
    ranks = [place_of(record) for record in history if "eval_loss" in record]
    return ranks.index(min(ranks)) == len(ranks) - 1


def place_of(record: dict[str, Any]) -> tuple[float, float]:
    """An evaluation's place, smaller is better: by the metric of train.best_by, then by loss.

    The record itself names the metric ("best_by"), so that a log can be read without its config.
    """
    metric, loss = record.get("best_by"), record["eval_loss"]
    # NaN compares with nothing: where it stood first, it would stay the best for ever.
    return (-record[metric] if metric else 0.0, loss if math.isfinite(loss) else math.inf)


def out_of_patience(history: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` evaluations were none better than the best before them."""
    ranks = [place_of(record) for record in history if "eval_loss" in record]
    return (
        patience is not None
        and bool(ranks)
        and len(ranks) - 1 - ranks.index(min(ranks)) >= patience
    )


def machine() -> dict[str, Any]:
    """Return what of this machine can move the last digits of a loss, or tells it from another."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"host": socket.gethostname(), "device": device, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Return the installed versions of what decides a run's numbers."""
    return installed(PACKAGES)


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _running_mean(values: tuple[float, ...], decay: float = 0.8) -> list[float]:
    """Return the exponentially weighted mean, corrected for its start (Adam's bias correction)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        means.append(mean / (1 - decay**count))
    return means
