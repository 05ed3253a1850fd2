"""Tokenised samples on disk or in memory, read without copying.

Three flat int32 arrays hold everything; a sample is a slice of each:

    tokens    ids of all samples, one after the other
    trained   (begin, end) pairs, the runs of each sample that carry loss
    segments  lengths of each sample's attention segments

Samples are read from their files when they are asked for, and nothing is mapped: a mapped page
counts as resident once it was read, so that an epoch in random order would end with the whole file
in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastft.data.encode import IGNORE
from fastft.errors import CouldNotFinishError

ARRAYS = ("tokens", "trained", "segments")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sequence. `input_ids` (L,), `labels` (L,) of the tokens themselves (-100: no loss),
    `segments` sum to L.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segments: np.ndarray


@dataclasses.dataclass
class Packed:
    """A sample as it is stored: ids, runs [begin, end, begin, end ...] that carry loss, lengths of
    segments.
    """

    tokens: np.ndarray
    trained: np.ndarray
    segments: np.ndarray

    @classmethod
    def of(
        cls,
        ids: Sequence[int] | np.ndarray,
        labels: Sequence[int] | np.ndarray,
        segments: Sequence[int] | None = None,
    ) -> Packed:
        """Return the stored form of ids and labels."""
        mask = np.zeros(len(ids) + 2, np.int8)
        mask[1:-1] = np.asarray(labels) != IGNORE
        edges = np.flatnonzero(np.diff(mask))
        lengths = [len(ids)] if segments is None else segments
        return cls(np.asarray(ids, np.int32), edges.astype(np.int32), np.asarray(lengths, np.int32))


class FileArray:
    """A flat int32 array in a file: a slice of it is read into memory, and nothing else is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._length = path.stat().st_size // 4

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self._length)
        wanted = max(stop - start, 0)
        try:
            # Opened anew each time (20 microseconds): works across processes, and no open file
            # hinders a rename.
            read = np.fromfile(self._path, np.int32, count=wanted, offset=4 * start)
        except OSError as error:
            raise CouldNotFinishError(
                f"the tokenised data in {self._path.parent} cannot be read: {error}."
            ) from error
        if len(read) != wanted:
            raise CouldNotFinishError(
                f"{self._path} became shorter while it was used; start again to tokenise anew."
            )
        return read


class JoinedArray:
    """Several flat arrays as one. A slice lies in one of them, as the samples do, or is all."""

    def __init__(self, parts: Sequence[np.ndarray | FileArray | JoinedArray]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, wanted: slice) -> np.ndarray:
        start, stop, _ = wanted.indices(len(self))
        if start == 0 and stop == len(self):
            return np.concatenate([part[:] for part in self._parts])
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        begin = int(self._starts[at])
        return self._parts[at][start - begin : stop - begin]


class TokenDataset:
    """Samples by number. `dataset[i]` is a `Sample`; a slice or a list of numbers gives a view of
    those samples.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray | FileArray | JoinedArray],
        bounds: Mapping[str, np.ndarray],
        order: np.ndarray | None = None,
        folder: Path | None = None,
    ) -> None:
        self._arrays, self._bounds, self.folder = arrays, bounds, folder
        self._order = np.arange(len(bounds["tokens"]) - 1) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> Any:
        if isinstance(index, slice | list | np.ndarray):
            return TokenDataset(self._arrays, self._bounds, self._order[index], self.folder)
        at = int(self._order[index])
        ids = np.array(self._part("tokens", at))
        labels = np.full(len(ids), IGNORE, np.int32)
        for begin, end in self._part("trained", at).reshape(-1, 2):
            labels[begin:end] = ids[begin:end]
        return Sample(ids, labels, np.array(self._part("segments", at)))

    @classmethod
    def joined(
        cls, flats: Sequence[Sequence[np.ndarray]], lengths: Sequence[Sequence[np.ndarray]]
    ) -> TokenDataset:
        """Return the dataset of several chunks, each three flat arrays and three arrays of
        lengths, in memory.
        """
        arrays: dict[str, np.ndarray | FileArray] = {}
        bounds = {}
        for i, name in enumerate(ARRAYS):
            arrays[name] = np.concatenate([np.zeros(0, np.int32), *(flat[i] for flat in flats)])
            bounds[name] = np.cumsum(
                np.concatenate([np.zeros(1, np.int64), *(counted[i] for counted in lengths)])
            )
        return cls(arrays, bounds)

    @classmethod
    def mixed(cls, parts: Sequence[TokenDataset]) -> TokenDataset:
        """Return all samples of several datasets, one after the other; nothing is copied."""
        arrays, bounds = {}, {}
        for name in ARRAYS:
            arrays[name] = JoinedArray([part._arrays[name] for part in parts])
            ends = np.cumsum([0, *(int(part._bounds[name][-1]) for part in parts)])
            shifted = [
                part._bounds[name][1:] + end for part, end in zip(parts, ends[:-1], strict=True)
            ]
            bounds[name] = np.concatenate([np.zeros(1, np.int64), *shifted])
        stored = np.cumsum([0, *(len(part._bounds["tokens"]) - 1 for part in parts)])
        order = [part._order + start for part, start in zip(parts, stored[:-1], strict=True)]
        return cls(arrays, bounds, np.concatenate(order))

    @property
    def order(self) -> np.ndarray:
        """Which samples of the store these are (N,)."""
        return self._order

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample (N,), without touching the tokens."""
        return np.diff(self._bounds["tokens"])[self._order]

    @property
    def trained_lengths(self) -> np.ndarray:
        """Tokens that carry loss in each sample (N,)."""
        runs = self._arrays["trained"][:].reshape(-1, 2)
        total = np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0], dtype=np.int64)])
        ends = total[self._bounds["trained"] // 2]
        return np.diff(ends)[self._order]

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum())

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry loss, of all samples."""
        return int(self.trained_lengths.sum())

    def _part(self, name: str, at: int) -> np.ndarray:
        bounds = self._bounds[name]
        return self._arrays[name][bounds[at] : bounds[at + 1]]


def flattened(samples: Sequence[Packed]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the three flat arrays of `samples`, and three of each sample's lengths in them."""
    flat, lengths = [], []
    for name in ARRAYS:
        parts = [getattr(sample, name) for sample in samples]
        flat.append(np.concatenate(parts) if parts else np.zeros(0, np.int32))
        lengths.append(np.array([len(part) for part in parts], np.int64))
    return flat, lengths


def in_memory(samples: Iterable[Packed]) -> TokenDataset:
    """Return the dataset of `samples`, held in memory."""
    flat, lengths = flattened(list(samples))
    return TokenDataset.joined([flat], [lengths])


class Writer:
    """Appends samples to a folder; `close` writes the bounds. What makes it whole: cache.py."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
        self._lengths: dict[str, list[np.ndarray]] = {name: [] for name in ARRAYS}

    def add(self, sample: Packed) -> None:
        """Append one sample."""
        flat, lengths = flattened([sample])
        self.add_many(*flat, *lengths)

    def add_many(self, *flat_and_lengths: np.ndarray) -> None:
        """Append several samples at once: the three flat arrays, then the three arrays of
        lengths.
        """
        for name, flat, lengths in zip(
            ARRAYS, flat_and_lengths[:3], flat_and_lengths[3:], strict=True
        ):
            self._files[name].write(np.ascontiguousarray(flat, np.int32).tobytes())
            self._lengths[name].append(np.asarray(lengths, np.int64))

    def close(self) -> TokenDataset:
        """Finish the files and return the dataset that reads them."""
        for name, file in self._files.items():
            file.close()
            bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths[name]]))
            np.save(self.folder / f"{name}.bounds.npy", bounds)
        return open_folder(self.folder)


def open_folder(folder: Path) -> TokenDataset:
    """Return the dataset of a folder that a Writer closed: bounds in memory (24 bytes a sample),
    the rest on disk.
    """
    arrays: dict[str, np.ndarray | FileArray] = {
        name: FileArray(folder / f"{name}.bin") for name in ARRAYS
    }
    bounds = {name: np.load(folder / f"{name}.bounds.npy") for name in ARRAYS}
    return TokenDataset(arrays, bounds, folder=folder)
