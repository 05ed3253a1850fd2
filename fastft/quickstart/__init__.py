"""The quickstart's embedded base model and its task: what `fastft quickstart` trains, and how it
is judged.

`base/` holds a Llama of 3.6M parameters that `tools/pretrain_quickstart.py` made; it completes
sentences about the towns of `world.py` and does not answer questions. Importing this module costs
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.files import write_atomically

# The most tokens an answer needs, turn end included; a model that needs more does not stop by
# itself.
MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class TaskFiles:
    """The three files of the task, each in the messages format: one question, one short answer."""

    train: Path
    """480 questions: 60 towns, four facts each, in English and Japanese."""
    heldout: Path
    """240 questions about 60 other towns, by turns in English and Japanese; the base model has
    read the facts.
    """
    unknown: Path
    """80 questions about 20 towns that are in no text; the answers stand only in the world's table.
    """


def base_path() -> Path:
    """Return the folder of the embedded base model (safetensors and tokenizer, loads with plain
    transformers).
    """
    # The package is never run out of a zip file: the model loaders need real paths anyway.
    return Path(str(resources.files("fastft.quickstart"))) / "base"


def write_task(folder: str | Path) -> TaskFiles:
    """Write train.jsonl, heldout.jsonl and unknown.jsonl into `folder` and return their paths.

    The content is the same on every machine. Raises FastFTError where other files of these names
    are there.
    """
    from fastft.quickstart import world

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = TaskFiles(folder / "train.jsonl", folder / "heldout.jsonl", folder / "unknown.jsonl")
    _write_jsonl(files.train, world.questions(world.FINE_TUNED))
    _write_jsonl(files.heldout, world.alternating_questions(world.HELD_OUT))
    _write_jsonl(files.unknown, world.alternating_questions(world.WITHHELD))
    return files


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Return the share, 0 to 1, of `predictions` that equal their answer.

    Both are normalised first, see `fastft.inference.metrics.comparable`.
    """
    from fastft.inference import metrics

    hits = [metrics.exact_match(p, [a]) for p, a in zip(predictions, answers, strict=True)]
    return sum(hits) / len(hits)


def quickstart_config(folder: str | Path, engine: str = "auto") -> dict[str, Any]:
    """Return the quickstart's config as nested values; `folder` holds the files that `write_task`
    wrote.

    Pass it to `fastft.config.make_config`; what is not named here keeps its default.
    """
    return {
        "project": "quickstart",
        "model": {
            "name": str(base_path()),
            "engine": engine,
            "quantization": "none",
            "max_seq_length": 128,
        },
        "data": {
            "source": str(Path(folder) / "train.jsonl"),
            "chat_template": "chatml",
            "eval_fraction": 0.05,
        },
        "lora": {"r": 16, "alpha": 16, "target_modules": "all-linear", "train_tokens": []},
        "train": {"effective_batch_size": 16, "max_steps": 120, "learning_rate": 3e-3},
    }


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.exists() and path.read_bytes() != text.encode():
        raise FastFTError(
            f"{path} is there and holds other rows than the quickstart's, so it stays as it is. "
            "Choose another --out, or move it away."
        )
    write_atomically(path, text)
