"""fastft's training session on pre-tokenised rows: what `fastft train` does, from its choices to
its loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.bench.job import Job, forbid_flash_attention_2
from fastft.config import RunConfig, make_config
from fastft.hardware import Choice, Hardware, named_gpu, probe

if TYPE_CHECKING:
    from fastft.training.session import Loop


@dataclass(frozen=True)
class Row:
    """A sequence as fastft's data layer hands it over."""

    input_ids: np.ndarray
    labels: np.ndarray

    @property
    def segments(self) -> list[int]:
        """One conversation a row."""
        return [len(self.input_ids)]


class Rows(list[Row]):
    """The workload as a dataset of fastft."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.array([len(row.input_ids) for row in self])


@dataclass(frozen=True)
class Workload:
    """The case's sequences in place of fastft's data layer."""

    train: Rows
    eval: None = None
    template: None = None


class OpenSession:
    """A session of `fastft train` on the workload."""

    def __init__(self, loop: Loop, choices: dict[str, Choice]) -> None:
        self.loop = loop
        self.choices = {name: f"{c.value} ({c.reason})" for name, c in choices.items()}
        """What was chosen and why, for the record."""

    @property
    def model(self) -> Any:
        """The model that will be trained."""
        return self.loop.trainer.model

    def run(self) -> None:
        """Train as the session does, signals included."""
        self.loop.run()
        if self.loop.memory.advice:
            raise MemoryError(self.loop.memory.advice)


def open_session(job: Job) -> OpenSession:
    """Choose, load and attach as `fastft train` does with the case's settings."""
    from fastft.progress import Reporter
    from fastft.training.session import Session

    config, cap = _config(job), job.cap_bytes
    session = Session(
        config,
        _capped(probe(job.work), job),
        report=Reporter(quiet=True),
        shuffle=False,  # every arm takes the sequences in the workload's order
        # What the driver calls free is that of the larger card.
        limit_bytes=None if cap is None else lambda: cap,
    )
    opened = session.open()
    if not job.case.flash_attention_2:
        forbid_flash_attention_2()
    sequences = zip(job.workload.input_ids, job.workload.labels, strict=True)
    prepared = session.prepare(opened, Workload(Rows(Row(*pair) for pair in sequences)))
    return OpenSession(session.loop(prepared), prepared.choices)


def _config(job: Job) -> RunConfig:
    case, work = job.case, job.workload
    return make_config(
        {
            "project": "bench",
            "output_dir": str(job.work),
            "model": {
                "name": job.model,
                "quantization": case.quantization,
                "dtype": job.dtype,
                "max_seq_length": max(len(ids) for ids in work.input_ids),
                "engine": job.settings.get("engine", "auto"),
            },
            "data": {"source": "the case's own sequences", "eval_fraction": 0},
            "lora": {
                "r": case.lora.r,
                "alpha": case.lora.alpha,
                "dropout": case.lora.dropout,
                "train_tokens": [],
            },
            "train": {
                "effective_batch_size": work.effective_batch_size,
                "max_steps": work.steps,
                "learning_rate": case.learning_rate,
                "scheduler": "constant",
                "warmup_steps": 0,
                "seed": case.seed,
                "save_steps": work.steps,
            }
            | job.settings.get("train", {}),
        },
        where=f"arm {job.arm}",
    )


def _capped(hardware: Hardware, job: Job) -> Hardware:
    """Return the machine as the cap makes it, so that what is chosen automatically fits the card
    that is stood in for.
    """
    cap = job.cap_bytes
    if cap is None:
        return hardware
    if hardware.kind != "cuda":
        return replace(hardware, ram_free_bytes=min(hardware.ram_free_bytes, cap))
    card = named_gpu(job.case.card) if job.case.card else hardware
    return replace(
        hardware,
        vram_bytes=cap,
        vram_free_bytes=min(hardware.vram_free_bytes, cap),
        capability=card.capability,
        bf16=card.bf16,
    )
