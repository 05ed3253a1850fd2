"""The pretend cards, and what this process believes about the one it has."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A card as its driver describes it: name, compute capability, bytes that torch reports."""

    name: str
    capability: tuple[int, int]
    memory: int
    multiprocessors: int


CARDS = {
    "t4": Card("Tesla T4", (7, 5), int(14.74 * GIB), 40),
    "l4": Card("NVIDIA L4", (8, 9), int(22.16 * GIB), 58),
    "a100": Card("NVIDIA A100-SXM4-40GB", (8, 0), int(39.56 * GIB), 108),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), int(79.1 * GIB), 132),
    "rtx3060": Card("NVIDIA GeForce RTX 3060", (8, 6), int(11.76 * GIB), 28),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), int(23.64 * GIB), 128),
}


@dataclass
class State:
    """What happened on the pretend card of this process."""

    card: Card = CARDS["t4"]
    count: int = 1
    mixed: collections.Counter[str] = field(default_factory=collections.Counter)
    """Operations that were given CPU and GPU tensors at once: a real card raises there."""
    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    """Launches of Triton kernels."""
    bitsandbytes: collections.Counter[str] = field(default_factory=collections.Counter)
    emptied: int = 0
    """Calls of torch.cuda.empty_cache."""


STATE = State()


class Ledger:
    """Bytes of the storages that are alive on the card, counted exactly; peaks to within 1 %.

    A storage leaves when torch frees it, which is looked up (weakly, in C++) only when somebody
    asks, or when the sum of everything that ever came would be a new peak.
    """

    def __init__(self) -> None:
        self.alive: dict[int, tuple[object, int]] = {}
        self.upper, self.peak = 0, 0
        self.limit: int | None = None

    def add(self, storage: object) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        size = storage.nbytes()  # type: ignore[attr-defined]
        reference = StorageWeakRef(storage)
        self.alive[reference.cdata] = (reference, size)
        self.upper += size
        if self.upper > 1.01 * self.peak:
            self.peak = max(self.peak, self.allocated())

    def allocated(self) -> int:
        """Return the bytes that are alive now."""
        dead = [key for key, (reference, _) in self.alive.items() if reference.expired()]  # type: ignore[attr-defined]
        for key in dead:
            del self.alive[key]
        self.upper = sum(size for _, size in self.alive.values())
        return self.upper

    def reset_peak(self) -> None:
        self.peak = self.allocated()


LEDGER = Ledger()


@contextlib.contextmanager
def counting_mixed() -> Iterator[collections.Counter[str]]:
    """Inside, collect the places where CPU and GPU tensors met."""
    STATE.mixed.clear()
    yield STATE.mixed
