"""From the sequences of one optimizer step to the rows that go through the model.

An optimizer step is `effective_batch_size` sequences and nothing else. How they are cut into
micro-batches is free: each micro-batch's loss is the *sum* of its token losses divided by the
number of supervised tokens of the whole step, so the gradient does not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fastft.data import trie

IGNORE = -100

Order = Literal["shuffled", "grouped", "given"]
"""How sequences come into steps: a permutation; groups with a common beginning, of which the order
is a permutation; or as the dataset has them.
"""

Rows = Literal["varlen", "packed", "padded", "trie"]
"""What a micro-batch is: one row without padding whose boundaries are `cu_seq_lens_q` (fastft's
attention) or `packed_seq_lengths` (Unsloth's GPU kernels), a padded batch, or a trie row, in which
beginnings that sequences share stand once (`trie_nodes` and `trie_pairs`; a row whose sequences
share nothing is a "varlen" one).
"""


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens that attends only to itself: a conversation, or one document of a joined
    text.
    """

    input_ids: np.ndarray  # (L,) int32
    # (L,) int32, IGNORE where no loss; the first is always IGNORE, nothing predicts it
    labels: np.ndarray
    place: int = 0
    """Its number in the step, as the step was drawn: what its dropout is keyed by."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Number of tokens that carry loss."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward pass."""

    inputs: dict[str, Any]  # what the model is called with, labels included
    tokens: int  # of its sequences, without padding
    unique_tokens: int  # the same, but one that sequences share counts once
    padded_tokens: int  # what goes through the model
    spans: tuple[tuple[int, int, int, int], ...] = ()
    """(row, start, tokens, place in the step) of each sequence; none of a trie row, which has no
    dropout.
    """
    keeps: int | None = None
    """It may keep no more for its backward pass than a row of so many tokens does; None: all."""


class StepBatches:
    """The optimizer steps of an epoch as a map-style dataset: `[k]` is the list of samples of step
    k.

    The order is drawn from (seed, epoch), so it is the same on every machine and after a resume.
    """

    def __init__(
        self, dataset: Any, effective_batch_size: int, seed: int, *, order: Order = "shuffled"
    ) -> None:
        self.dataset = dataset
        self.effective_batch_size = effective_batch_size
        self.seed, self.shuffled = seed, order != "given"
        self.groups: list[list[int]] = []
        if order == "grouped":
            ids = [np.asarray(dataset[i].input_ids) for i in range(len(dataset))]
            self.groups = trie.groups(ids, effective_batch_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of `epoch`."""
        count = len(self.groups) or len(self.dataset)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(count) if self.shuffled else np.arange(count)
        if self.groups:
            order = np.concatenate([self.groups[i] for i in order])
        self.order = order

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.effective_batch_size)

    def __getitem__(self, step: int) -> list[Any]:
        first = step * self.effective_batch_size
        return [self.dataset[int(i)] for i in self.order[first : first + self.effective_batch_size]]


def segments_of(samples: Sequence[Any]) -> list[Segment]:
    """Return the segments of `samples` (each with input_ids, labels and segments), first labels
    masked.
    """
    result: list[Segment] = []
    for sample in samples:
        start = 0
        for length in sample.segments:
            end = start + int(length)
            labels = np.array(sample.labels[start:end], dtype=np.int64)
            labels[0] = IGNORE
            ids = np.asarray(sample.input_ids[start:end], dtype=np.int64)
            result.append(Segment(ids, labels, place=len(result)))
            start = end
        assert start == len(sample.input_ids), "segments must add up to the sequence"
    return result


def supervised_tokens(segments: Sequence[Segment]) -> int:
    """Return the number of tokens that carry loss: the divisor of the step's loss."""
    return sum(segment.supervised for segment in segments)


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return rows of indices, each of at most `budget` tokens (a longer sequence is a row of its
    own).

    First-fit decreasing: at most 11/9 of the optimal number of rows, plus one (Johnson 1973).
    Deterministic.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = next((row for row, left in enumerate(room) if length <= left), None)
        if fitting is None:
            rows.append([index])
            room.append(budget - length)
        else:
            rows[fitting].append(index)
            room[fitting] -= length
    return rows


def cut_padded(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return batches of indices whose padded size (count x longest) is at most `budget` tokens,
    like lengths together.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def micro_batches(
    segments: Sequence[Segment],
    budget: int,
    *,
    rows: Rows,
    pad_token_id: int,
    device: Any,
    pinned: bool = False,
    rope_changes_at: int | None = None,
    stretch: float | None = None,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of one step, each of at most `budget` tokens (padding counts, a
    shared token counts once), or of one segment.

    Segments without a supervised token are left out: they add nothing to loss or gradient.
    `pinned`: a GPU gets them from pinned memory, for which the host does not wait.
    `rope_changes_at`: see `groups`. `stretch`: of trie rows, see `split_trees`.
    """
    if stretch is not None:
        trees, segments, budget = split_trees(segments, budget, stretch)
        for tree in trees:
            yield replace(_trie_row(tree, device, pinned), keeps=budget)
    for chosen in groups(segments, budget, rows, rope_changes_at):
        if rows == "padded":
            yield _padded(chosen, pad_token_id, device, pinned)
        elif rows == "trie" and trie.build([segment.input_ids for segment in chosen]).shares:
            yield _trie_row(chosen, device, pinned)
        else:
            yield _padding_free(chosen, device, rows, pinned)


def _sent(arrays: dict[str, np.ndarray], device: Any, pinned: bool) -> dict[str, Any]:
    """The arrays as tensors on `device`.

    From ordinary memory the host first waits until the GPU has computed all it was given, so it
    could not launch one micro-batch while another one computes. torch keeps a pinned block until
    its copy is done.
    """
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if not pinned:
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return {n: tensor.pin_memory().to(device, non_blocking=True) for n, tensor in tensors.items()}


def same_segments(some: Sequence[Segment], others: Sequence[Segment]) -> bool:
    """Whether both are the same sequences in the same order, token for token."""
    return len(some) == len(others) and all(
        a.place == b.place
        and np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.labels, b.labels)
        for a, b in zip(some, others, strict=True)
    )


def row_sizes(
    segments: Sequence[Segment],
    budget: int,
    rows: Rows,
    rope_changes_at: int | None = None,
    stretch: float | None = None,
) -> list[tuple[int, int]]:
    """Return (tokens that go through the model, tokens of the longest sequence) of each
    micro-batch that `micro_batches` makes; where one keeps less than its tokens do, so many.
    """
    sizes = []
    if stretch is not None:
        trees, segments, budget = split_trees(segments, budget, stretch)
        sizes += [(budget, max(map(len, tree))) for tree in trees]
    for chosen in groups(segments, budget, rows, rope_changes_at):
        longest = max(map(len, chosen))
        if rows == "trie":
            tokens = unique_tokens(chosen)
        else:
            tokens = longest * len(chosen) if rows == "padded" else sum(map(len, chosen))
        sizes.append((tokens, longest))
    return sizes


def groups(
    segments: Sequence[Segment], budget: int, rows: Rows, rope_changes_at: int | None = None
) -> list[list[Segment]]:
    """The segments of each micro-batch, without those that have no supervised token.

    Sequences of up to `rope_changes_at` tokens and longer ones are kept apart, where it is given:
    there the longest sequence of a micro-batch decides the positions of all others (longrope).
    """
    useful = [segment for segment in segments if segment.supervised]
    if rope_changes_at is None:
        return _cut_alike(useful, budget, rows)
    short = [segment for segment in useful if len(segment) <= rope_changes_at]
    long = [segment for segment in useful if len(segment) > rope_changes_at]
    return [*_cut_alike(short, budget, rows), *_cut_alike(long, budget, rows)]


def _cut_alike(useful: list[Segment], budget: int, rows: Rows) -> list[list[Segment]]:
    lengths, ids = [len(s) for s in useful], [s.input_ids for s in useful]
    if rows == "padded":
        found = cut_padded(lengths, budget)
    elif rows == "trie" and useful and trie.build(ids).shares:
        found = trie.cut(ids, budget)
    else:
        found = cut(lengths, budget)
    return [[useful[i] for i in indices] for indices in found]


def split_trees(
    segments: Sequence[Segment], budget: int, stretch: float
) -> tuple[list[list[Segment]], list[Segment], int]:
    """Return (the segments of each tree with more tokens than any row would have without sharing,
    all other segments, the tokens of the largest such row).

    A row of a tree may have `stretch` times as many tokens, because it can do with what the smaller
    one keeps; a tree that is larger still is cut.
    """
    useful = [segment for segment in segments if segment.supervised]
    if not useful:
        return [], [], budget
    lengths = [len(segment) for segment in useful]
    largest = max(sum(lengths[i] for i in row) for row in cut(lengths, budget))
    large, others = [], []
    for indices in trie.trees([segment.input_ids for segment in useful]):
        tree = [useful[i] for i in indices]
        parts = trie.cut([s.input_ids for s in tree], int(stretch * largest))
        for part in ([tree[i] for i in chosen] for chosen in parts):
            if len(part) > 1 and unique_tokens(part) > largest:
                large.append(part)
            else:
                others += part
    return large, others, largest


def unique_tokens(segments: Sequence[Segment]) -> int:
    """Return the tokens of `segments` that a trie row computes: shared beginnings count once."""
    return trie.build([segment.input_ids for segment in segments]).tokens if segments else 0


CPU_MULTIPLE = 32


def _padding_free(segments: list[Segment], device: Any, rows: Rows, pinned: bool) -> MicroBatch:
    """One row (1, T): position ids restart at each segment; the boundaries stay on the CPU, where
    they are read.

    On a CPU the last segment gets a tail of unlabelled tokens up to a multiple of 32: oneDNN's
    matrix products are up to a third faster then, and their generated code is used again. The tail
    comes after every token that could see it.
    """
    import torch

    lengths = [len(segment) for segment in segments]
    tail = -sum(lengths) % CPU_MULTIPLE if torch.device(device).type == "cpu" else 0
    boundaries = np.concatenate([[0], np.cumsum(lengths)])
    boundaries[-1] += tail
    row = {
        "input_ids": np.concatenate([*(s.input_ids for s in segments), np.zeros(tail, np.int64)]),
        "labels": np.concatenate([*(s.labels for s in segments), np.full(tail, IGNORE)]),
        "position_ids": np.concatenate(
            [*(np.arange(length) for length in lengths), np.arange(tail)]
        ),
    }
    inputs = _sent({name: array[None] for name, array in row.items()}, device, pinned)
    if rows == "packed":
        inputs["packed_seq_lengths"] = torch.from_numpy(np.diff(boundaries).astype(np.int32))
    else:
        inputs["cu_seq_lens_q"] = torch.from_numpy(boundaries.astype(np.int32))
    spans = tuple(
        (0, int(start), len(segment), segment.place)
        for start, segment in zip(boundaries, segments, strict=False)
    )
    tokens = sum(lengths)
    return MicroBatch(inputs, tokens, tokens, tokens + tail, spans)


def _trie_row(segments: list[Segment], device: Any, pinned: bool) -> MicroBatch:
    """One row (1, T) of the segments' trie, with the same tail on a CPU as `_padding_free`'s.

    `trie_nodes` (N, 4) int64 stays on the CPU: start, length, position and parent of each node.
    `trie_pairs` (3, P) int64: index of a state, its target, how many sequences have this pair.
    """
    import torch

    row = trie.row_of([s.input_ids for s in segments], [s.labels for s in segments], ignore=IGNORE)
    tokens = len(row.input_ids)
    tail = -tokens % CPU_MULTIPLE if torch.device(device).type == "cpu" else 0
    nodes = row.trie.table
    nodes[-1, 1] += tail  # the last node has no children, so nothing sees its tail
    arrays = {
        "input_ids": np.concatenate([row.input_ids, np.zeros(tail, np.int64)])[None],
        "position_ids": np.concatenate([row.position_ids, np.arange(tail)])[None],
        "trie_pairs": np.stack([row.states, row.targets, row.counts]),
    }
    inputs = _sent(arrays, device, pinned)
    inputs["trie_nodes"] = torch.from_numpy(nodes)
    return MicroBatch(inputs, sum(map(len, segments)), tokens, padded_tokens=tokens + tail)


def _padded(segments: list[Segment], pad_token_id: int, device: Any, pinned: bool) -> MicroBatch:
    """A batch (B, T), padded on the right with the mask that hides the padding."""
    longest = max(len(segment) for segment in segments)
    shape = (len(segments), longest)
    ids, labels = np.full(shape, pad_token_id, np.int64), np.full(shape, IGNORE, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, segment in enumerate(segments):
        ids[row, : len(segment)], labels[row, : len(segment)], mask[row, : len(segment)] = (
            segment.input_ids,
            segment.labels,
            1,
        )
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    inputs = _sent(arrays, device, pinned)
    spans = tuple((row, 0, len(segment), segment.place) for row, segment in enumerate(segments))
    tokens = int(mask.sum())
    return MicroBatch(inputs, tokens, tokens, mask.size, spans)
