"""A run over several cards: every card holds the whole model and computes its share of each step.

VRAM is that of one card, and the flat buffer in which gradients are summed. RAM is needed once a
process. A step is as long as its largest share, and the sum over the cards.
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastft.config import RunConfig
from fastft.hardware import GIB, Hardware
from fastft.planning.memory import Situation, Term, trainable
from fastft.planning.shape import ModelShape

LINK_BYTES_PER_SECOND = 6e9
"""Between two cards over PCIe 3.0 x16 without peer access, as on Kaggle's two T4; assumed, not
measured. NVLink is ten times as fast, a 10 Gbit/s network between machines a fifth.
"""


KAGGLE_RAM_BYTES = 29 * GIB
"""Of Kaggle's notebook with two T4, the machine that two T4 are usually met in."""


def machine_with(hardware: Hardware, cards: int) -> Hardware:
    """Return the machine that is assumed for `cards` of a card that was only named.

    Its RAM is Kaggle's for two T4, and otherwise `cards` times that of a machine with one.
    """
    if cards == 1 or hardware.disk_assumed_bytes is None:
        return hardware
    kaggle = hardware.name == "Tesla T4" and cards == 2
    ram = KAGGLE_RAM_BYTES if kaggle else cards * hardware.ram_bytes
    where = "Kaggle's notebook with two T4" if kaggle else f"a machine with {cards} cards"
    disk = hardware.disk_assumed_bytes
    assumed = f"assumed: {where}, {ram / GIB:.0f} GiB RAM and {disk / GIB:.0f} GiB free disk"
    return replace(
        hardware,
        gpu_count=cards,
        ram_bytes=ram,
        ram_free_bytes=ram - GIB,
        notes=(assumed,),
    )


def share_of(config: RunConfig, cards: int) -> RunConfig:
    """Return the config as one card sees it: with its share of a step's sequences."""
    share = math.ceil(config.train.effective_batch_size / cards)
    train = config.train.model_copy(update={"effective_batch_size": share})
    return config.model_copy(update={"train": train})


def buffer_term(shape: ModelShape, s: Situation) -> Term:
    """Return the buffer of the all-reduce: each gradient once more, in float32."""
    count = trainable(shape, s)
    return Term(
        name="all-reduce buffer",
        bytes=4 * count,
        formula=f"4 x {count:,} trained parameters",
        source="training/ranks.py, add_up",
    )


def spread(terms: list[Term], shape: ModelShape, cards: int) -> list[Term]:
    """Return the VRAM of one card whose base is spread over `cards` (train.shard_base).

    Layers lie in parts, but for the one that computes and the one that is fetched meanwhile;
    embeddings, head and norms are together for a whole step.
    """
    in_layers = sum(weight.parameters for weight in shape.of("linear", "expert"))
    found, together = [], 0.0
    for term in terms:
        if not term.name.startswith("weights"):
            found.append(term)
            continue
        share = {"weights": in_layers / shape.parameters, "weights in NF4": 1.0}
        layers = term.bytes * share.get(term.name, 1.0 if term.name == "weights in int8" else 0.0)
        together += 2 * layers / shape.layers
        mine = int(term.bytes - layers + layers / cards)
        formula = f"layers' {layers / GIB:.2f} GiB / {cards} cards, and the rest"
        found.append(term.model_copy(update={"bytes": mine, "formula": formula}))
    return [
        *found,
        Term(
            name="two layers together",
            bytes=int(together),
            formula=f"2 of {shape.layers} layers",
            source="torch FSDP2: one computes, the next is fetched",
        ),
    ]


def whole_base_in_ram(shape: ModelShape, s: Situation) -> Term:
    """Return the RAM in which a process reads a 16-bit base before it is spread."""
    return Term(
        name="whole base, while loading",
        bytes=shape.parameters * s.compute_bytes,
        formula=f"{shape.parameters:,} x {s.compute_bytes} bytes",
        source="training/sharded.py",
    )


def other_processes(terms: list[Term], cards: int) -> list[Term]:
    """Return the RAM of the other processes of this machine, as one term."""
    one = sum(term.bytes for term in terms)
    return [
        Term(
            name="other processes",
            bytes=(cards - 1) * one,
            formula=f"{cards - 1} x the terms above",
            source="one process a card",
        )
    ]


def communication_seconds(shape: ModelShape, s: Situation, cards: int) -> float:
    """Return the seconds of a step's all-reduce.

    A ring sends 2 (N - 1)/N of the buffer through each link (Patarasuk and Yuan 2009, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations").
    """
    sent = 2 * (cards - 1) / cards * 4 * trainable(shape, s)
    return sent / LINK_BYTES_PER_SECOND


def notes(config: RunConfig, cards: int) -> list[str]:
    """Return what a person should know about this many cards."""
    sequences = config.train.effective_batch_size
    found = [
        f"{cards} cards: VRAM is per card; RAM and disk are the machine's. The losses are those of "
        "one card; sums between cards are taken as "
        f"{LINK_BYTES_PER_SECOND / 1e9:g} GB/s (PCIe, assumed)"
    ]
    if sequences < cards:
        found.append(
            f"a step has {sequences} sequences: {cards - sequences} of {cards} cards would have "
            f"nothing to do. Set train.effective_batch_size to {cards} or more"
        )
    return found
