"""`fastft init`: a commented config whose defaults, comments and choices come from config.py."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any, Literal, Protocol, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from fastft.config import EMBEDDED, ModelConfig, RunConfig
from fastft.hardware import GIB, Hardware, named_gpu, probe

# (VRAM from, model): 4-bit weights, 2,048 tokens and LoRA r 16 with room to spare; none needs a
# licence click.
SUGGESTED = (
    (38 * GIB, "unsloth/Qwen3-14B-unsloth-bnb-4bit"),
    (21 * GIB, "unsloth/Qwen3-8B-unsloth-bnb-4bit"),
    (11 * GIB, "unsloth/Qwen3-4B-Instruct-2507-unsloth-bnb-4bit"),
    (7 * GIB, "unsloth/Qwen3-1.7B-unsloth-bnb-4bit"),
    (0, "Qwen/Qwen3-0.6B"),
)

EMBEDDED_RATE = 3e-3
"""The embedded base is some hundred times smaller than others: at the usual rate it learns nothing
in a short run.
"""
EMBEDDED_ONLY_TRIES = (
    "the embedded quickstart model knows nothing but its own invented towns. It is for trying the "
    "commands on your data; name a real base with --model for a useful result."
)


def is_embedded(model: str) -> bool:
    """Whether `model` names the tiny base that comes with fastft."""
    return ModelConfig(name=model).name == ModelConfig(name=EMBEDDED).name


def commented_config(
    *,
    gpu: str | None = None,
    model: str | None = None,
    data: str = "data.jsonl",
    project: str | None = None,
    seen: DataSeen | None = None,
    file: str = "run.yaml",
) -> str:
    """Return YAML text: every setting with its default, its meaning and its choices, for the card
    `gpu` or this machine.

    `seen` is what a look at the data gave: it decides epochs and, up to what the machine is good
    for, max_seq_length. `project` is by default the data file's name. `file` is what the config
    will be called in the comments. Raises FastFTError for an unknown card.
    """
    hardware = named_gpu(gpu) if gpu else probe()
    values: dict[tuple[str, ...], Any] = {
        ("project",): project or project_of(data),
        ("model", "name"): model or suggested_model(hardware),
        ("data", "source"): data,
    }
    if is_embedded(values["model", "name"]):
        values["train", "learning_rate"] = EMBEDDED_RATE
    if hardware.kind != "cuda":
        values["model", "max_seq_length"] = 512
    elif hardware.vram_bytes > 38 * GIB:
        values["model", "max_seq_length"] = 4096
    if seen is not None:
        longest = values.get(("model", "max_seq_length"), 2048)
        values["model", "max_seq_length"] = min(seen.max_seq_length, longest)
        values["train", "epochs"] = seen.epochs
    head = [
        f"# A fastft run for {hardware.name}. Check it:  fastft plan {file}",
        f"#                                look at the data:  fastft data {file}",
        f"#                                train:             fastft train {file}",
        f"# The data: {seen or f'{data} is no file here, so nothing was looked at'}.",
        "# A line that is left out keeps the default shown here.",
    ]
    return "\n".join([*head, "", *_section(RunConfig, (), values)]) + "\n"


class DataSeen(Protocol):
    """What `fastft.data.glance` gives."""

    @property
    def max_seq_length(self) -> int:
        """Tokens that hold nearly all rows."""
        ...

    @property
    def epochs(self) -> int:
        """Passes over the data."""
        ...


def project_of(data: str) -> str:
    """Return a project name for the data at `data`: its file's name without endings."""
    name = Path(data).name.split(".")[0] or "my-run"
    return re.sub(r"[^\w-]+", "-", name).strip("-")[:60] or "my-run"


def suggested_model(hardware: Hardware) -> str:
    """Return the base model that fits a machine with room to spare."""
    vram = hardware.vram_bytes if hardware.kind == "cuda" else 0
    return next(name for least, name in SUGGESTED if vram >= least)


def _section(section: type[BaseModel], path: tuple[str, ...], values: dict[Any, Any]) -> list[str]:
    lines: list[str] = []
    for name, field in section.model_fields.items():
        here, indent = (*path, name), "  " * len(path)
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            lines += [
                "",
                f"{name}:  # {' '.join((inner.__doc__ or '').split())}",
                *_section(inner, here, values),
            ]
            continue
        default = field.get_default(call_default_factory=True)
        value = values.get(here, None if default is PydanticUndefined else default)
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).splitlines()[0]
        comment = "; ".join(part for part in (_choices(inner), field.description) if part)
        lines.append(
            (f"{indent}{name}: {text}".ljust(44) + (f"  # {comment}" if comment else "")).rstrip()
        )
    return lines


def _choices(annotation: Any) -> str:
    """Return "a | b | c" where a field has a fixed set of values."""
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [_choices(part) for part in get_args(annotation)]
        return parts[0] if len([p for p in parts if p]) == 1 and len(parts) == 1 else ""
    return ""
