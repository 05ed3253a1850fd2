"""Does it fit? Peak VRAM, RAM and disk of every phase and the time of a step, before anything is
loaded.

    shape.py    what the model is made of (config.json, safetensors headers)
    resolve.py  the config's automatic choices
    memory.py   every byte of VRAM and RAM, as named terms
    disk.py     every byte on disk
    time.py     seconds of a step
    advise.py   what to change where it does not fit
    calibrate.py  the plan against the first real steps
    several.py  more than one card
    show.py     tables, bars, the README's table of models and cards

Nothing here imports torch; a plan takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field

from fastft.config import RunConfig, long_warmup
from fastft.errors import FastFTError
from fastft.hardware import GIB, Hardware
from fastft.planning import several
from fastft.planning.advise import Change, apply_changes, cheapest_changes
from fastft.planning.calibrate import Calibration
from fastft.planning.disk import adapter_bytes, checkpoint_term, export_term, tokenizer_bytes
from fastft.planning.memory import (
    Situation,
    Term,
    eval_terms,
    export_terms,
    load_terms,
    merge_terms,
    train_terms,
    trainable,
)
from fastft.planning.resolve import (
    MARGIN,
    pick_gradient_checkpointing,
    pick_micro_batch_tokens,
    pick_quantization,
    ram_terms,
)
from fastft.planning.resolve import resolve as resolve_choices
from fastft.planning.shape import (
    KNOWN_MODELS,
    ModelShape,
    known_shape,
    load_shape,
    shape_from_config,
)
from fastft.planning.show import plan_table
from fastft.planning.time import StepTime, step_time, steps_of_run

__all__ = [
    "KNOWN_MODELS", "Calibration", "Change", "ModelShape", "Phase", "Plan", "Situation", "Term",
    "apply_changes", "known_shape", "load_shape", "pick_gradient_checkpointing",
    "pick_micro_batch_tokens", "pick_quantization", "plan", "plan_table", "shape_from_config",
]  # fmt: skip

Verdict = Literal["fits", "tight", "does_not_fit"]


class Phase(BaseModel):
    """Peaks of one phase, and the terms they are the sums of."""

    vram_bytes: int
    ram_bytes: int
    disk_bytes: int
    vram_terms: list[Term] = Field(default_factory=list)
    ram_terms: list[Term] = Field(default_factory=list)
    disk_terms: list[Term] = Field(default_factory=list)


class Plan(BaseModel):
    """What a run needs, what there is, and what to change where it does not fit. All sizes are
    bytes.
    """

    model: str
    hardware: str
    verdict: Verdict
    reason: str
    """The tightest resource with its numbers."""
    phases: dict[str, Phase]
    available: dict[str, int]
    """Free vram, ram and disk."""
    parameters: int
    trainable_parameters: int
    seconds_per_step: float | None
    steps: int | None
    """Optimizer steps of the run, where that can be said without reading the data."""
    seconds: float | None
    """Of the whole run, evaluation and export not counted; at most, where its sequences are
    shorter.
    """
    steps_basis: str
    tokens_per_step: int
    tokens_per_sec: float | None
    time_basis: str
    choices: dict[str, tuple[Any, str]]
    changes: list[Change]
    notes: list[str]

    @property
    def peak_vram_bytes(self) -> int:
        """Largest VRAM of any phase."""
        return max(phase.vram_bytes for phase in self.phases.values())

    @property
    def peak_ram_bytes(self) -> int:
        """Largest RAM of any phase."""
        return max(phase.ram_bytes for phase in self.phases.values())

    def print(self, console: Any = None) -> None:
        """Print the verdict, a table of phases, the bar of the training step and the changes."""
        from fastft.planning.show import print_plan

        print_plan(self, console)

    def plot(self, path: str | Path) -> Path:
        """Write the stacked bar of every phase as a PNG; returns the path."""
        from fastft.planning.show import plot_plan

        return plot_plan(self, Path(path))


def plan(
    config: RunConfig,
    hardware: Hardware,
    shape: ModelShape | None = None,
    *,
    mean_length: float | None = None,
    gpus: int = 1,
) -> Plan:
    """Return whether `config` fits `hardware`, or `gpus` of them with a process each, with every
    term of every peak.

    `shape` is read from the model's config.json and headers where it is not given. Memory is
    planned for the longest sequences the config allows; `mean_length` (tokens; default: those too)
    only enters the time. Raises FastFTError for an unknown model, an unreadable config.json,
    unknown target modules.
    """
    shape = shape or load_shape(config.model.name, config.model.revision)
    if gpus < 1:
        raise FastFTError(f"--gpus is {gpus}; it must be at least 1.")
    if gpus > 1 and hardware.kind != "cuda":
        raise FastFTError(f"--gpus {gpus}: {hardware.name} has no NVIDIA GPU. Name one with --gpu.")
    result = _measure(config, hardware, shape, mean_length, gpus)
    if result.verdict == "does_not_fit":
        result.changes = cheapest_changes(config, hardware, shape, partial(_verdict_of, gpus=gpus))
    return result


def _verdict_of(
    config: RunConfig, hardware: Hardware, shape: ModelShape, gpus: int = 1
) -> tuple[Verdict, int]:
    result = _measure(config, hardware, shape, None, gpus)
    return result.verdict, max(phase.disk_bytes for phase in result.phases.values())


def _measure(
    config: RunConfig,
    hardware: Hardware,
    shape: ModelShape,
    mean_length: float | None,
    gpus: int,
) -> Plan:
    resolved = resolve_choices(several.share_of(config, gpus), hardware, shape)
    s = resolved.situation
    phases = _phases(config, shape, s)
    if gpus > 1:
        phases = _on_each_card(phases, shape, s, gpus, config.train.shard_base)
    available = {
        "vram": hardware.vram_free_bytes,
        "ram": hardware.ram_free_bytes,
        "disk": hardware.disk_free_bytes(config.output_dir),
    }
    verdict, reason = _judge(phases, available, s)
    length = mean_length or config.model.max_seq_length
    timing = _timing(config, shape, s, hardware, length, gpus)
    steps, steps_basis = steps_of_run(config, timing.seconds)
    seconds = None if timing.seconds is None or steps is None else timing.seconds * steps
    return Plan(
        model=shape.name,
        hardware=hardware.name,
        verdict=verdict,
        reason=reason,
        phases=phases,
        available=available,
        parameters=shape.parameters,
        trainable_parameters=trainable(shape, s),
        seconds_per_step=timing.seconds,
        steps=steps,
        seconds=seconds,
        steps_basis=steps_basis,
        tokens_per_step=timing.tokens,
        tokens_per_sec=timing.tokens_per_sec,
        time_basis=timing.basis,
        choices={name: (choice.value, choice.reason) for name, choice in resolved.choices.items()},
        changes=[],
        notes=[
            *shape.notes,
            *hardware.notes,
            *_notes(config, shape, s, mean_length),
            *filter(None, [steps and long_warmup(config.train, steps)]),
            *(several.notes(config, gpus) if gpus > 1 else []),
        ],
    )


def _timing(
    config: RunConfig, shape: ModelShape, s: Situation, hardware: Hardware, length: float, gpus: int
) -> StepTime:
    """The time of a step: of the largest share of its sequences, and of the sum over the cards."""
    sequences = config.train.effective_batch_size
    share = several.share_of(config, gpus).train.effective_batch_size
    one = step_time(shape, s, hardware, sequences=share, mean_length=length)
    if gpus == 1 or one.seconds is None:
        return one
    sending = several.communication_seconds(shape, s, gpus)
    seconds, tokens = one.seconds + sending, sequences * length
    return one.model_copy(
        update={
            "tokens": int(tokens),
            "seconds": seconds,
            "tokens_per_sec": tokens / seconds,
            "basis": f"{one.basis}; {share} of {sequences} sequences a card, and {sending:.2f} s "
            "to sum the gradients",
        }
    )


def _on_each_card(
    phases: dict[str, Phase], shape: ModelShape, s: Situation, gpus: int, shard: bool
) -> dict[str, Phase]:
    """The phases of one card among several: the first process alone merges and exports."""
    from_ram = shard and s.quantization == "none"
    buffer = several.buffer_term(shape, s)
    changed = dict(phases)
    for name in ("load", "train", "eval"):
        phase = phases[name]
        vram = [*phase.vram_terms, buffer] if name == "train" else phase.vram_terms
        if shard and (name != "load" or from_ram):
            vram = several.spread(vram, shape, gpus)
        ram = phase.ram_terms
        if name == "load" and from_ram:
            ram = [*ram, several.whole_base_in_ram(shape, s)]
        ram = [*ram, *several.other_processes(ram, gpus)]
        changed[name] = phase.model_copy(
            update={
                "vram_terms": vram,
                "vram_bytes": sum(t.bytes for t in vram),
                "ram_terms": ram,
                "ram_bytes": sum(t.bytes for t in ram),
            }
        )
    return changed


def _notes(
    config: RunConfig, shape: ModelShape, s: Situation, mean_length: float | None
) -> list[str]:
    notes = []
    longest, made_for = config.model.max_seq_length, shape.max_positions
    if made_for is not None and longest > made_for:
        notes.append(
            f"model.max_seq_length {longest:,} is above the {made_for:,} positions that "
            f"{shape.name} was made for: it "
            f"answers badly beyond them; set at most {made_for:,}"
        )
    if mean_length is None:
        notes.append(
            f"every sequence is taken as {longest:,} tokens long; shorter ones need less "
            "memory and time"
        )
    if config.lora.train_tokens == "auto":
        notes.append(
            "where a chat template brings new tokens, their embedding rows are trained too "
            "(hidden size each)"
        )
    if shape.experts and s.quantization == "nf4":
        notes.append(
            "experts count as NF4, as in Unsloth's 4-bit checkpoints; plain bitsandbytes "
            "leaves them in 16 bit"
        )
    return notes


def _phases(config: RunConfig, shape: ModelShape, s: Situation) -> dict[str, Phase]:
    download = (
        []
        if shape.local
        else [_disk("base model", shape.checkpoint_bytes, "safetensors files in the Hub's cache")]
    )
    checkpoints = checkpoint_term(shape, s, config.train.save_total_limit)
    final = _disk(
        "final/", adapter_bytes(shape, s) + tokenizer_bytes(shape), "adapter and tokenizer"
    )
    kept = [*download, checkpoints, final]
    exports = [export_term(shape, s, target) for target in config.export.to if target != "adapter"]
    merged = [term for term in exports if term.name == "merged"]
    computes: dict[str, Callable[[ModelShape, Situation], list[Term]]] = {
        "load": load_terms,
        "train": train_terms,
        "eval": eval_terms,
    }
    phases = {
        name: _phase(
            s, terms(shape, s), ram_terms(shape, s, name), download if name == "load" else kept
        )
        for name, terms in computes.items()
    }
    phases["merge"] = _phase(s, [], merge_terms(shape, s), kept + merged)
    writes = merge_terms(shape, s) if merged and len(exports) == 1 else export_terms(shape, s)
    phases["export"] = _phase(s, [], writes, kept + exports)
    return phases


def _disk(name: str, size: int, source: str) -> Term:
    return Term(name=name, bytes=size, formula="sum of files", source=source)


def _phase(s: Situation, device: list[Term], host: list[Term], disk: list[Term]) -> Phase:
    """On a CPU the tensors live in RAM; Apple's GPU shares RAM, so there they count as both."""
    vram = [] if s.device == "cpu" else device
    ram = host if s.device == "cuda" else [*host, *device]
    return Phase(
        vram_bytes=sum(t.bytes for t in vram),
        ram_bytes=sum(t.bytes for t in ram),
        disk_bytes=sum(t.bytes for t in disk),
        vram_terms=vram,
        ram_terms=ram,
        disk_terms=disk,
    )


def _judge(
    phases: dict[str, Phase], available: dict[str, int], s: Situation
) -> tuple[Verdict, str]:
    """The resource that is fullest decides: above all of it, does not fit; above nine tenths,
    tight.
    """
    shares = []
    for name, phase in phases.items():
        for place in ("vram", "ram", "disk"):
            need = getattr(phase, f"{place}_bytes")
            if need and not (place == "vram" and s.device == "cpu"):
                shares.append((need / max(available[place], 1), need, place, name))
    share, need, place, name = max(shares)
    what = place if place == "disk" else place.upper()
    reason = (
        f"{name} needs {need / GIB:.1f} GiB of {what}, {available[place] / GIB:.1f} GiB are free"
    )
    if share > 1:
        return "does_not_fit", reason
    return ("tight" if share > 1 - MARGIN else "fits"), reason
