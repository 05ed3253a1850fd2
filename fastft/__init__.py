"""fastft: Unsloth-first LoRA and QLoRA fine-tuning, from a dataset to a file that llama.cpp runs.

The names below are loaded when they are first used (PEP 562); importing fastft imports nothing
heavy. `fastft.FastLanguageModel` imports Unsloth at that moment, so read it before importing trl
or transformers.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name: module that defines it
_PUBLIC = {
    "FastFTError": "fastft.errors",
    "FastLanguageModel": "fastft.engines.loading",
    "FastSFTTrainer": "fastft.training.sft",
    "RunConfig": "fastft.config",
    "RunResult": "fastft.training.train",
    "Chat": "fastft.verbs",
    "chat": "fastft.inference.generate",
    "evaluate": "fastft.verification.evaluation",
    "export": "fastft.verbs",
    "inspect_data": "fastft.data.inspect",
    "load_config": "fastft.config",
    "plan": "fastft.planning",
    "probe": "fastft.hardware",
    "push": "fastft.verbs",
    "sweep": "fastft.verbs",
    "train": "fastft.verbs",
    "verify": "fastft.verbs",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from fastft.config import RunConfig, load_config
    from fastft.data.inspect import inspect_data
    from fastft.engines.loading import FastLanguageModel
    from fastft.errors import FastFTError
    from fastft.hardware import probe
    from fastft.inference.generate import chat
    from fastft.planning import plan
    from fastft.training.sft import FastSFTTrainer
    from fastft.training.train import RunResult
    from fastft.verbs import Chat, export, push, sweep, train, verify
    from fastft.verification.evaluation import evaluate


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}")
    if name in {"FastLanguageModel", "FastSFTTrainer"}:
        _join_other_processes()
        _import_unsloth_first()
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return __all__


def _join_other_processes() -> None:
    """Join what torchrun started, where it did, before any library reads its variables."""
    from fastft.config import TrainConfig
    from fastft.training import ranks

    ranks.join(TrainConfig().lost_after_minutes)


def _import_unsloth_first() -> None:
    """Import Unsloth where this machine will use it, so that what is imported afterwards is
    patched.
    """
    if "fastft.engines.stock" in sys.modules:
        return  # the process is the stock engine's
    from fastft.engines import choose_engine
    from fastft.hardware import probe

    if choose_engine("auto", probe()).value == "unsloth":
        importlib.import_module("fastft.engines.unsloth")
