"""fastft's training session on pre-tokenised rows: what `fastft train` does, from its choices to
its loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastft.bench.arms import Job, forbid_flash_attention_2
from fastft.config import make_config
from fastft.hardware import Hardware, named_gpu, probe


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


class OpenSession:
    """A `fastft train` session whose data layer was replaced by the workload."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.model = session.model

    def trainer(self) -> Any:
        """Return the session's own trainer, in the workload's order instead of a permutation."""
        trainer = self._session._trainer()
        trainer.steps.order = np.arange(len(trainer.steps.dataset))
        trainer.steps.set_epoch = lambda epoch: None
        return trainer

    def run(self, trainer: Any) -> None:
        """Train as the session does, signals included."""
        from fastft.training.train import _stop_signals

        with _stop_signals(trainer):
            trainer.train()
        if self._session.memory.advice:
            raise MemoryError(self._session.memory.advice)

    @property
    def choices(self) -> dict[str, str]:
        """What was chosen and why, for the record."""
        return {
            name: f"{choice.value} ({choice.reason})"
            for name, choice in self._session.choices.items()
        }


def open_session(job: Job) -> OpenSession:
    """Choose, load and attach as `fastft train` does with the case's settings."""
    from fastft.engines import loading
    from fastft.progress import Reporter
    from fastft.runs.folder import RunFolder
    from fastft.training import callbacks
    from fastft.training.train import _Session

    case, work = job.case, job.workload
    config = make_config(
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
    hardware = _capped(probe(job.work), job)
    if (cap := job.cap_bytes) is not None:
        callbacks._limit_bytes = lambda: (
            cap
        )  # what the driver calls free is that of the larger card
    choices = loading.choose_loading(config, hardware)
    run = RunFolder(config.run_dir)
    session = _Session(
        config, run, hardware, choices, Reporter(quiet=True), None, time.monotonic(), mirror=None
    )
    session._load_tokenizer()
    if not case.flash_attention_2:
        forbid_flash_attention_2()
    rows = Rows(Row(ids, labels) for ids, labels in zip(work.input_ids, work.labels, strict=True))
    session.data = SimpleNamespace(train=rows, eval=None, template=SimpleNamespace(needs_tokens=[]))  # type: ignore[assignment]
    session._load_model()
    return OpenSession(session)


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
