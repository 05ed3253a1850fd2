"""A run's folder on disk: its config, its record, its log, its plots. Reading needs neither torch nor transformers.

OUTPUT_DIR/PROJECT/
  run.yaml      the config as resolved        run.json   versions, hardware, choices, timings, results
  log.jsonl     one line a step               loss.png   report.md
  checkpoints/  checkpoint-N/ + manifest      final/     the adapter          export/
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.checkpoint import write_atomically
from fastft.config import RunConfig, dump_config, make_config, read_yaml, redact
from fastft.errors import FastFTError

PACKAGES = (
    "fastft",
    "unsloth",
    "unsloth_zoo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "bitsandbytes",
)


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run, and the small files in it."""

    path: Path

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
        """Held-out sequences, one {"input_ids", "labels"} a line: what certificates are measured on."""
        return self.path / "samples.jsonl"

    @property
    def export(self) -> Path:
        """Where exports go unless told otherwise."""
        return self.path / "export"

    def write_config(self, config: RunConfig) -> None:
        """Write run.yaml: every default written out, no secrets."""
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
        write_atomically(
            self.path / "run.json", redact(json.dumps(self.read_record() | values, indent=1, ensure_ascii=False))
        )

    def append_log(self, record: dict[str, Any]) -> None:
        """Append one line to log.jsonl."""
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
                f"{self.path / 'log.jsonl'} is damaged: {error}. Delete it to go on without its plot."
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
                        f"{self.path / 'log.jsonl'} line {number} is damaged: {error}. Delete that line to go on."
                    ) from error
        return records

    def cut_log(self, step: int) -> list[dict[str, Any]]:
        """Drop what was logged after `step` (those steps are done again) and return what is left."""
        kept = [record for record in self.read_log() if record["step"] <= step]
        write_atomically(self.path / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return kept

    def plot_loss(self) -> Path | None:
        """Draw loss.png from log.jsonl: training loss, its running mean, held-out loss. None where nothing was logged."""
        log = self.read_log()
        train = [(r["step"], r["loss"]) for r in log if "loss" in r]
        before = self.read_record().get("eval_loss_before")
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
            axes.plot(*zip(*held_out, strict=True), color="tab:red", marker="o", markersize=4, label="held out")
        axes.set(xlabel="optimizer step", ylabel="loss per trained token", title=self.path.name)
        axes.grid(alpha=0.3)
        axes.legend()
        path = self.path / "loss.png"
        figure.savefig(path, dpi=120)
        return path


def versions() -> dict[str, str]:
    """Return the installed versions of what decides a run's numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
