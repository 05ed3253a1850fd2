"""Where a run does not fit: the cheapest changes that make it fit, in order, each with what it
costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastft.config import MOVES_THE_BASE, RunConfig, make_config
from fastft.errors import FastFTError
from fastft.hardware import GIB, KNOWN_GPUS, MACS, Hardware, named_gpu
from fastft.planning.resolve import trains_in_mlx
from fastft.planning.shape import ModelShape

Judge = Callable[[RunConfig, Hardware, ModelShape], tuple[str, int]]
"""(verdict, largest need of disk in bytes) of a config on a machine."""
SMALLER_PASSES = "more, smaller passes a step; the gradient is the same"
Made = list[tuple[str, Any, str]]
"""Changes: key, new value, cost."""


@dataclass
class Change:
    """One change: a config key with its new value, or another card (`key` is "gpu"), or room on
    the disk ("disk").
    """

    key: str
    old: Any
    new: Any
    cost: str
    enough: bool
    """Whether the run fits after this change and those before it."""


def cheapest_changes(
    config: RunConfig, hardware: Hardware, shape: ModelShape, judge: Judge
) -> list[Change]:
    """Return the changes, cheapest first, up to the one after which `judge` no longer says
    does_not_fit.

    Changes that turn out not to be needed once a later one is made are dropped again. Where no
    change of the config suffices, it is room on the disk if that alone is missing, else the
    smallest known card that does: with nothing else changed if there is one, else with the changes
    that it needs.
    """
    made = _cheapest(config, hardware, shape, judge)
    if made is not None:
        return _as_changes(config, made)
    roomy = replace(hardware, disk_assumed_bytes=1 << 62)
    verdict, need = judge(config, roomy, shape)
    if verdict != "does_not_fit":
        free = hardware.disk_free_bytes(config.output_dir)
        cost = "room on that disk, or output_dir (and HF_HOME, for the base model) on a larger one"
        old, new = (f"{size / GIB:.1f} GiB free" for size in (free, need))
        return [Change("disk", old, new, cost, True)]
    return _another_card(config, hardware, shape, judge)


def _cheapest(
    config: RunConfig, hardware: Hardware, shape: ModelShape, judge: Judge
) -> Made | None:
    """The changes of the config that make it fit `hardware`, or None."""
    made: Made = []
    for change in _candidates(config, hardware, shape):
        made.append(change)
        if _fits(config, made, hardware, shape, judge):
            return _needed(config, made, hardware, shape, judge)
    return None


def _fits(
    config: RunConfig, made: Made, hardware: Hardware, shape: ModelShape, judge: Judge
) -> bool:
    try:
        return judge(_with(config, made), hardware, shape)[0] != "does_not_fit"
    except FastFTError:  # two settings that do not go together, as float32 with NF4
        return False


def _candidates(
    config: RunConfig, hardware: Hardware, shape: ModelShape
) -> Iterator[tuple[str, Any, str]]:
    """Changes from the cheapest to the dearest; none changes what is learnt before quantisation
    does.
    """
    train, longest = config.train, config.model.max_seq_length
    if train.micro_batch_tokens == "auto" or train.micro_batch_tokens > longest:
        yield "train.micro_batch_tokens", longest, SMALLER_PASSES
    if train.gradient_checkpointing is not True:
        yield "train.gradient_checkpointing", True, "a third more time; the gradient is the same"
    if hardware.kind == "cuda" and train.optimizer == "adamw":
        yield "train.optimizer", "adamw_8bit", "8-bit moments; no loss in quality known"
    if config.train.save_total_limit > 1:
        yield "train.save_total_limit", 1, "fewer checkpoints to go back to"
    if hardware.kind == "cpu" and train.fused_layers is False:
        yield "train.fused_layers", "auto", "none: the gradient is the same up to rounding"
    if config.model.dtype == "float32":
        yield "model.dtype", "auto", "16-bit arithmetic where the machine has it"
    may_round = config.model.quantization != "nf4" and config.lora.init not in MOVES_THE_BASE
    if (hardware.kind == "cuda" or trains_in_mlx(config, hardware)) and may_round:
        yield "model.quantization", "nf4", "slower passes, and a base rounded to 4 bits"
    if hardware.kind == "cuda" and train.optimizer != "paged_adamw_8bit":
        cost = "optimizer state moves through PCIe when memory is short"
        yield "train.optimizer", "paged_adamw_8bit", cost
    rank = config.lora.r
    if rank > 16 and config.lora.init != "orthogonal":
        yield "lora.r", 16, f"a smaller adapter than rank {rank}"
    while longest > 512:
        longest = max(512, longest // 2)
        yield "model.max_seq_length", longest, f"longer conversations are cut at {longest:,} tokens"
        yield "train.micro_batch_tokens", longest, SMALLER_PASSES


def _with(config: RunConfig, made: Made) -> RunConfig:
    return make_config(_applied(config.model_dump(), [(key, value) for key, value, _ in made]))


def _applied(values: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in changes:
        section, _, name = key.partition(".")
        values[section][name] = value
    return values


def _needed(
    config: RunConfig, made: Made, hardware: Hardware, shape: ModelShape, judge: Judge
) -> Made:
    """Drop, the dearest first, every change without which the run fits too; of one key the last
    value counts.
    """
    kept = list({key: change for change in made for key in [change[0]]}.values())
    for change in reversed(list(kept)):
        without = [other for other in kept if other is not change]
        if _fits(config, without, hardware, shape, judge):
            kept = without
    return kept


def _as_changes(config: RunConfig, made: Made) -> list[Change]:
    values = config.model_dump()
    changes = []
    for number, (key, value, cost) in enumerate(made, 1):
        section, _, name = key.partition(".")
        changes.append(Change(key, values[section][name], value, cost, number == len(made)))
    return changes


def _another_card(
    config: RunConfig, hardware: Hardware, shape: ModelShape, judge: Judge
) -> list[Change]:
    cards = sorted(
        KNOWN_GPUS, key=lambda name: (KNOWN_GPUS[name].vram_bytes, KNOWN_GPUS[name].flops)
    )
    if hardware.kind == "mps":  # a Mac's run goes to another Mac
        cards = [f"mac-{gib}" for gib in MACS]
    another = "another Mac" if hardware.kind == "mps" else "another card"
    for key in cards:
        if _fits(config, [], named_gpu(key), shape, judge):
            return [Change("gpu", hardware.name, key, another, True)]
    for key in cards:
        made = _cheapest(config, named_gpu(key), shape, judge)
        if made is not None:
            card = Change("gpu", hardware.name, key, f"{another}, and on it:", False)
            return [card, *_as_changes(config, made)]
    return [Change("gpu", hardware.name, None, "no single known card fits it", False)]


def apply_changes(config: RunConfig, changes: list[Change]) -> dict[str, Any]:
    """Return the config as a nested dict with `changes` made; another card and room on the disk
    are none of it.
    """
    return _applied(
        config.model_dump(), [(change.key, change.new) for change in changes if "." in change.key]
    )
