"""A benchmark case: what is trained, on what lengths, by whom, with which settings. Cases are YAML
files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from fastft.config import read_yaml
from fastft.errors import FastFTError, one_of

CASES = Path(__file__).parent / "cases"

TUNING = (
    "OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
)  # fmt: skip
"""Beginnings of the environment variables that tune speed or memory: an arm gets them only from
its case.
"""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSpec(_Model):
    """A family and its dimensions (random weights, nothing is downloaded), or a real model's id or
    folder.
    """

    id: str | None = None
    family: str | None = None
    """transformers' model_type: llama, qwen3, gemma3_text ..."""
    config: dict[str, Any] = Field(default_factory=dict)
    """hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
    vocab_size ...
    """

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelSpec:
        if (self.id is None) == (self.family is None):
            raise ValueError("give either id, or family and config")
        return self


class Lora(_Model):
    """The adapter, equal in every arm."""

    r: int = Field(16, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class Shared(_Model):
    """Sequences with common beginnings, in tokens. Thoughts and answers carry loss."""

    beginning: int = Field(ge=1)
    """Of a group: a system prompt, a document."""
    prompt: int = Field(ge=1)
    thought: int = Field(0, ge=0)
    answer: int = Field(ge=1)
    group: int | None = Field(None, ge=1)
    """Sequences that follow each other with one beginning; null: all."""
    turns: bool = False
    """A group is a conversation, a sequence a turn: all earlier turns without their thoughts (as
    Qwen3's template writes them), then its own.
    """


class Lengths(_Model):
    """Tokens of a sequence: seeded log-normal, one fixed length, a file with one number a line, or
    sequences that share beginnings.
    """

    median: int | None = Field(None, ge=2)
    sigma: float = Field(0.8, ge=0.0)
    shortest: int = Field(16, ge=2)
    longest: int = Field(1024, ge=2)
    fixed: int | None = Field(None, ge=2)
    file: str | None = None
    shared: Shared | None = None
    prompt_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of each sequence that carries no loss (its prompt)."""

    @model_validator(mode="after")
    def _one_of_four(self) -> Lengths:
        given = (self.median, self.fixed, self.file, self.shared)
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of median, fixed, file and shared")
        return self

    @model_serializer(mode="wrap")
    def _without_shared(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Cases from before there was `shared` keep their hash, and so their results."""
        values: dict[str, Any] = handler(self)
        return values if self.shared else {k: v for k, v in values.items() if k != "shared"}


class ArmSettings(_Model):
    """What one arm does in one table; keys that an arm does not know are refused by the arm."""

    settings: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    """Set before the worker starts: allocator settings, thread waiting."""
    implementation: str | None = None
    """module:class of an arm of your own (see arms.py); default: the built-in arm of this name."""
    source: str
    """Where these settings come from: a documentation page, a notebook, "fastft's defaults"."""

    @field_validator("environment")
    @classmethod
    def _can_be_set(cls, value: dict[str, str]) -> dict[str, str]:
        bad = [
            name for name, text in value.items() if not name or "=" in name or "\0" in name + text
        ]
        if bad:
            raise ValueError(
                f"no such environment variable can be set: {', '.join(map(repr, bad))}"
            )
        return value


class TableSettings(_Model):
    """One table: its arms, and what of the workload differs from the case's own."""

    arms: dict[str, ArmSettings] = Field(min_length=1)
    lengths: Lengths | None = None
    effective_batch_size: int | None = Field(None, ge=1)


class Tolerances(_Model):
    """The parity gate, against plain peft in float32."""

    loss: float = 1e-2
    """Relative difference of the first step's loss."""
    trace: float = 2e-2
    """Largest relative difference of any step's loss."""
    cosine: float = 0.99
    """Least cosine between the first step's LoRA gradients, all tensors as one vector."""


class Case(_Model):
    """What `--case NAME` runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Also the beginning of the results' file names."""
    title: str
    device: Literal["cpu", "cuda"]
    card: str | None = None
    """The card it is meant for (a name of KNOWN_GPUS); on a larger one it runs under the memory cap
    and is labelled so.
    """
    memory_cap_gb: float | None = Field(None, gt=0)
    """GB (1e9 bytes) of VRAM, or on a CPU of the worker's own memory without mapped files."""
    model: ModelSpec
    quantization: Literal["none", "nf4"] = "none"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    flash_attention_2: bool = True
    """False for a card without it (T4)."""
    lora: Lora = Lora()
    lengths: Lengths
    effective_batch_size: int = Field(8, ge=1)
    warmup_steps: int = Field(1, ge=1)
    """Not timed: compilation, caches. At least the first step, which the parity gate looks at."""
    steps: int = Field(4, ge=1)
    """Timed optimizer steps of a run."""
    repeats: int = Field(5, ge=1)
    seed: int = Field(3407, ge=0, lt=2**32)
    learning_rate: float = Field(2e-4, gt=0, lt=1)
    threads: int | None = Field(None, ge=1)
    """CPU threads of a worker; default: the usable cores."""
    timeout_seconds: int = Field(1800, ge=1)
    parity_layers: int | None = Field(None, ge=1)
    """For models too large for float32: the gradient and the trace are compared on the same shape
    with so many layers.
    """
    tolerances: Tolerances = Tolerances()
    tables: dict[Literal["defaults", "matched"], TableSettings] = Field(min_length=1)

    def only(self, arms: Mapping[str, Container[str]]) -> Case:
        """Return the case with only these arms of each table, and without the other tables."""
        tables = {
            name: table.model_copy(
                update={"arms": {a: s for a, s in table.arms.items() if a in arms[name]}}
            )
            for name, table in self.tables.items()
            if name in arms
        }
        return self.model_copy(update={"tables": tables})

    @property
    def hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the case's content: results of different cases are
        never mixed.
        """
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def known_cases(folder: Path = CASES) -> dict[str, Path]:
    """Return the committed cases by name."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_case(name: str, folder: Path = CASES) -> Case:
    """Return the case called `name`, or the one in the YAML file `name`; raises FastFTError with
    every problem.
    """
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        known = known_cases(folder)
        if name not in known:
            raise one_of("case", name, known)
        path = known[name]
    if not path.is_file():
        raise FastFTError(
            f"case file {path} {'is a folder' if path.is_dir() else 'does not exist'}."
        )
    try:
        return Case.model_validate(read_yaml(path))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()
        ]
        raise FastFTError(f"{path}: " + "; ".join(problems)) from error
