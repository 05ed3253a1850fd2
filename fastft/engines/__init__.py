"""The ways to load a model and attach LoRA: `unsloth`, `stock` (plain transformers + peft), and
`mlx` (Apple Silicon).

The engine is chosen before either is imported, because importing Unsloth patches transformers, trl
and peft in the whole process: the stock engine refuses to run in such a process.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

from fastft.engines.base import Engine
from fastft.errors import FastFTError
from fastft.hardware import Choice, Hardware, mlx_is_installed

ENGINES = ("unsloth", "stock", "mlx")


def choose_engine(requested: str, hardware: Hardware, *, quantization: str = "none") -> Choice:
    """Return the engine's name and why, without importing it.

    Raises FastFTError where the engine asked for cannot run here.
    """
    reason_against = _why_not_unsloth(hardware, quantization)
    if requested == "unsloth":
        if reason_against:
            raise FastFTError(
                f"model.engine is unsloth, but {reason_against}. Set model.engine: stock, or auto."
            )
        return Choice("unsloth", "asked for")
    if requested == "stock":
        return Choice("stock", "asked for")
    if requested == "mlx":
        if not mlx_is_installed():
            raise FastFTError(
                "model.engine is mlx, but mlx or mlx-lm is not installed: pip install "
                "'fastft[mac]', or set model.engine: auto."
            )
        return Choice("mlx", "asked for")
    if hardware.kind == "mps" and mlx_is_installed():
        return Choice("mlx", "Apple Silicon (tested on Linux; nobody of us has run it on a Mac)")
    if reason_against:
        return Choice("stock", f"plain transformers + peft, because {reason_against}")
    return Choice(
        "unsloth",
        "Unsloth runs on this machine" + ("" if hardware.kind == "cuda" else " (its CPU path)"),
    )


def get_engine(name: str) -> Engine:
    """Import and return the engine `name`; raises FastFTError where the process is already the
    other one's.
    """
    if name == "stock" and "unsloth" in sys.modules:
        raise FastFTError(
            "the stock engine cannot run in a process that has imported unsloth, which "
            "patches transformers, trl and "
            "peft. Start a new Python process (or restart the notebook's runtime) with "
            "engine: stock."
        )
    assert name in ENGINES, name
    first_process = os.environ.get("RANK", "0") == "0"
    if name == "unsloth" and "unsloth" not in sys.modules and first_process:
        print("loading Unsloth (takes some seconds)", file=sys.stderr, flush=True)
    return importlib.import_module(f"fastft.engines.{name}").ENGINE


def _why_not_unsloth(hardware: Hardware, quantization: str) -> str:
    """Return the reason why Unsloth cannot do this here, or an empty string."""
    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed (pip install --no-deps unsloth unsloth_zoo)"
    if hardware.kind == "mps":
        return (
            "this is a Mac and mlx-lm is not installed (pip install 'fastft[mac]'); float32 on MPS "
            "(nobody of us has run it on a Mac)"
        )
    if hardware.kind == "cpu" and quantization == "int8":
        return "Unsloth's CPU path has no int8 weights"
    return ""
