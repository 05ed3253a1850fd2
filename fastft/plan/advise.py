"""Where a run does not fit: the cheapest changes that make it fit, in order, each with what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

from fastft.config import RunConfig, make_config
from fastft.hardware import KNOWN_GPUS, Hardware, named_gpu
from fastft.plan.shape import ModelShape

Judge = Callable[[RunConfig, Hardware, ModelShape], tuple[str, str]]


class Change(BaseModel):
    """One change: a config key with its new value, or another card (`key` is "gpu")."""

    key: str
    old: Any
    new: Any
    cost: str
    enough: bool
    """Whether the run fits after this change and those before it."""


def cheapest_changes(config: RunConfig, hardware: Hardware, shape: ModelShape, judge: Judge) -> list[Change]:
    """Return the changes, cheapest first, up to the one after which `judge` no longer says does_not_fit.

    Changes that turn out not to be needed once a later one is made are dropped again. Where no change of the config
    suffices, the list is the smallest known card that does, with nothing else changed if possible.
    """
    made: list[tuple[str, Any, str]] = []
    for key, value, cost in _candidates(config, hardware, shape):
        made.append((key, value, cost))
        if judge(_with(config, made), hardware, shape)[0] != "does_not_fit":
            return _as_changes(config, _needed(config, made, hardware, shape, judge))
    return _another_card(config, hardware, shape, judge)


def _candidates(config: RunConfig, hardware: Hardware, shape: ModelShape) -> Iterator[tuple[str, Any, str]]:
    """Changes from the cheapest to the dearest; none changes what is learnt before quantisation does."""
    train, longest = config.train, config.model.max_seq_length
    if train.micro_batch_tokens == "auto" or train.micro_batch_tokens > longest:
        yield "train.micro_batch_tokens", longest, "more, smaller passes a step; the gradient is the same"
    if train.gradient_checkpointing is not True:
        yield "train.gradient_checkpointing", True, "a third more time; the gradient is the same"
    if hardware.kind == "cuda" and train.optimizer == "adamw":
        yield "train.optimizer", "adamw_8bit", "8-bit moments; no loss in quality known"
    if config.train.save_total_limit > 1:
        yield "train.save_total_limit", 1, "fewer checkpoints to go back to"
    if config.model.quantization in {"none", "int8"} and hardware.kind == "cuda" and config.lora.init == "default":
        yield "model.quantization", "nf4", "slower passes, and a base rounded to 4 bits"
    if hardware.kind == "cuda" and train.optimizer != "paged_adamw_8bit":
        yield "train.optimizer", "paged_adamw_8bit", "optimizer state moves through PCIe when memory is short"
    rank = config.lora.r
    if rank > 16 and config.lora.init != "orthogonal":
        yield "lora.r", 16, f"a smaller adapter than rank {rank}"
    while longest > 512:
        longest = max(512, longest // 2)
        yield "model.max_seq_length", longest, f"longer conversations are cut at {longest:,} tokens"
        yield "train.micro_batch_tokens", longest, "more, smaller passes a step; the gradient is the same"


def _with(config: RunConfig, made: list[tuple[str, Any, str]]) -> RunConfig:
    return make_config(_applied(config.model_dump(), [(key, value) for key, value, _ in made]))


def _applied(values: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, value in changes:
        section, _, name = key.partition(".")
        values[section][name] = value
    return values


def _needed(
    config: RunConfig, made: list[tuple[str, Any, str]], hardware: Hardware, shape: ModelShape, judge: Judge
) -> list[tuple[str, Any, str]]:
    """Drop, the dearest first, every change without which the run fits too; of one key the last value counts."""
    kept = list({key: change for change in made for key in [change[0]]}.values())
    for change in reversed(list(kept)):
        without = [other for other in kept if other is not change]
        if judge(_with(config, without), hardware, shape)[0] != "does_not_fit":
            kept = without
    return kept


def _as_changes(config: RunConfig, made: list[tuple[str, Any, str]]) -> list[Change]:
    values = config.model_dump()
    changes = []
    for number, (key, value, cost) in enumerate(made, 1):
        section, _, name = key.partition(".")
        changes.append(Change(key=key, old=values[section][name], new=value, cost=cost, enough=number == len(made)))
    return changes


def _another_card(config: RunConfig, hardware: Hardware, shape: ModelShape, judge: Judge) -> list[Change]:
    for key in sorted(KNOWN_GPUS, key=lambda name: (KNOWN_GPUS[name].vram_bytes, KNOWN_GPUS[name].flops)):
        if judge(config, named_gpu(key), shape)[0] != "does_not_fit":
            return [Change(key="gpu", old=hardware.name, new=key, cost="another card", enough=True)]
    return [Change(key="gpu", old=hardware.name, new=None, cost="no single known card fits it", enough=False)]


def apply_changes(config: RunConfig, changes: list[Change]) -> dict[str, Any]:
    """Return the config as a nested dict with `changes` made; a change of the card is not one of the config's."""
    return _applied(config.model_dump(), [(change.key, change.new) for change in changes if change.key != "gpu"])
