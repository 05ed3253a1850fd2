"""What a worker is asked to do, and what an arm must offer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastft.bench.case import Case
from fastft.bench.workload import Workload


@dataclass(frozen=True)
class Job:
    """What a worker is asked to do."""

    case: Case
    table: str
    arm: str
    implementation: str | None
    settings: dict[str, Any]
    model: str
    """Folder or id of the base model."""
    dtype: str
    """The case's, or float32 for the reference."""
    workload: Workload
    work: Path
    """A scratch folder of this run alone."""
    cap_bytes: int | None = None
    """Memory that the run may use, where it is less than the machine has."""


class UnsupportedError(Exception):
    """An arm cannot do this here; the message says why."""


class Arm(Protocol):
    """What `module:class` in a case must offer."""

    def load(self, job: Job) -> Any:
        """Import the libraries, load the base model, attach LoRA; return the model."""
        ...

    def train(self, job: Job, witness: Any) -> int | None:
        """Train every step of the workload in order, with `witness` as a callback; return the
        tokens it claims, or None.
        """
        ...


def forbid_flash_attention_2() -> None:
    """Let Unsloth take, on a newer card, the path of one without FlashAttention 2 (T4). Call it
    after the import.
    """
    for module in [
        m
        for name, m in sys.modules.items()
        if name.startswith(("unsloth.models.", "unsloth.utils."))
    ]:
        if hasattr(module, "HAS_FLASH_ATTENTION"):
            module.HAS_FLASH_ATTENTION = False  # type: ignore[attr-defined]


def without_network() -> None:
    """Unsloth may otherwise install packages and ask the network for statistics on import."""
    import os

    os.environ.setdefault("UNSLOTH_AUTO_INSTALL", "0")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
