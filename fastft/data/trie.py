"""Sequences with common beginnings as one row, in which each beginning stands once.

Attention is causal, so a state depends on the tokens before it and on nothing else: sequences that
begin alike have the same states there, and the gradient of a shared state is the sum of what its
continuations send back. Computing it once is exact.

    a  1 2 3 4 5            1 2 3          node 0, positions 0 to 2
    b  1 2 3 6 7                 4 5       node 1, positions 3 and 4, parent 0
    c  8 9                       6 7       node 2, positions 3 and 4, parent 0
                            8 9            node 3, positions 0 and 1

The row is the nodes, depth first: 1 2 3 4 5 6 7 8 9. A node attends to its ancestors and causally
to itself. The last token of a node may have a target for each child, so labels become pairs of
(index of a state, target); a pair that several sequences have stands once, with its count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SHORTEST = 16
"""Tokens of a common stretch that are worth a node of their own; a shorter one is computed by each
sequence. A node costs attention a tile of its own, which pads to 16 keys or more.
"""


@dataclass(frozen=True)
class Trie:
    """The distinct prefixes of some sequences."""

    start: np.ndarray  # (N,) int64: of each node in the row; nodes are in depth-first order
    length: np.ndarray  # (N,) int64
    position: np.ndarray  # (N,) int64: of a node's first token in its sequences
    parent: np.ndarray  # (N,) int64: -1 for a root; always before its children
    end: np.ndarray  # (sequences,) int64: the node that holds each sequence's last token

    @property
    def tokens(self) -> int:
        """Distinct tokens: what is computed."""
        return int(self.length.sum())

    @property
    def shares(self) -> bool:
        """Whether any two sequences have a node in common."""
        return len(self.start) < len(self.end) or bool((self.parent >= 0).any())

    @property
    def table(self) -> np.ndarray:
        """Return (N, 4) int64: start, length, position and parent of each node."""
        columns = [self.start, self.length, self.position, self.parent]
        return np.ascontiguousarray(np.stack(columns, axis=1))

    @property
    def largest_tree(self) -> int:
        """Tokens of the largest tree that sequences share; 0 where none share any."""
        sizes: dict[int, int] = {}
        holders: dict[int, int] = {}
        root_of = np.arange(len(self.parent))
        for node, parent in enumerate(self.parent.tolist()):
            root = int(root_of[node] if parent < 0 else root_of[parent])
            root_of[node] = root
            sizes[root] = sizes.get(root, 0) + int(self.length[node])
        for end in self.end.tolist():
            holders[int(root_of[end])] = holders.get(int(root_of[end]), 0) + 1
        return max((size for root, size in sizes.items() if holders[root] > 1), default=0)

    def path(self, node: int) -> list[int]:
        """Return the nodes from the root down to `node`."""
        found = []
        while node >= 0:
            found.append(node)
            node = int(self.parent[node])
        return found[::-1]


@dataclass(frozen=True)
class TrieRow:
    """One row of a trie as arrays, and what is to be predicted in it."""

    input_ids: np.ndarray  # (T,) int64
    position_ids: np.ndarray  # (T,) int64: depth in the trie
    trie: Trie
    states: np.ndarray  # (P,) int64: index in the row of the state that predicts
    targets: np.ndarray  # (P,) int64
    counts: np.ndarray  # (P,) int64: sequences that have this pair


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Return the number of tokens that `a` and `b` begin with alike."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def sort_by_prefix(sequences: Sequence[np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Return the lexicographic order of `sequences` (token ids, not negative), and for each place
    in it the tokens that it shares with the place before (0 for the first).
    """
    # Big-endian bytes compare as the numbers do, and a prefix comes before what goes on.
    keys = [np.asarray(ids).astype(">i8").tobytes() for ids in sequences]
    order = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    shared = np.zeros(len(order), np.int64)
    for place in range(1, len(order)):
        shared[place] = common_prefix(sequences[order[place - 1]], sequences[order[place]])
    return order, shared


def build(sequences: Sequence[np.ndarray], shortest: int = SHORTEST) -> Trie:
    """Return the trie of `sequences`, (length,) token ids each and none empty; stretches of fewer
    than `shortest` common tokens are not shared.
    """
    order, shared = sort_by_prefix(sequences)
    nodes: list[tuple[int, int, int, int]] = []  # start, length, position, parent
    end = np.empty(len(sequences), np.int64)
    # Places [low, high) of the order, whose tokens from `begin` on belong to no node yet.
    waiting = [(0, len(order), 0, -1)] if order else []
    while waiting:
        low, high, begin, parent = waiting.pop()
        alone = high - low == 1
        alike = len(sequences[order[low]]) if alone else int(shared[low + 1 : high].min())
        if alike - begin >= (1 if alone else shortest):
            start = nodes[-1][0] + nodes[-1][1] if nodes else 0
            nodes.append((start, alike - begin, begin, parent))
            begin, parent = alike, len(nodes) - 1
        if alone:
            end[order[low]] = parent
            continue
        edges = [low, *(np.flatnonzero(shared[low + 1 : high] <= alike) + low + 1).tolist(), high]
        # The first part is done next, with everything below it: nodes come depth first.
        waiting += [(a, b, begin, parent) for a, b in reversed(list(pairwise(edges)))]
    start_of, length, position, parents = np.array(nodes, np.int64).reshape(-1, 4).T
    return Trie(start_of, length, position, parents, end)


def row_of(
    sequences: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    *,
    ignore: int,
    shortest: int = SHORTEST,
) -> TrieRow:
    """Return `sequences` as one row; `labels` (length,) each are what the state before has to
    predict, `ignore` where no loss.
    """
    trie = build(sequences, shortest)
    ids, positions = np.empty(trie.tokens, np.int64), np.empty(trie.tokens, np.int64)
    states, targets = [], []
    for sequence, target, end in zip(sequences, labels, trie.end.tolist(), strict=True):
        places = np.concatenate(
            [np.arange(trie.start[n], trie.start[n] + trie.length[n]) for n in trie.path(end)]
        )
        ids[places], positions[places] = sequence, np.arange(len(sequence))
        supervised = np.flatnonzero(target[1:] != ignore)
        states.append(places[supervised])
        targets.append(target[supervised + 1])
    pairs = np.stack([np.concatenate(states), np.concatenate(targets)]).astype(np.int64)
    (states, targets), counts = np.unique(pairs, axis=1, return_counts=True)
    return TrieRow(ids, positions, trie, states, targets, counts.astype(np.int64))


def cut(sequences: Sequence[np.ndarray], budget: int, shortest: int = SHORTEST) -> list[list[int]]:
    """Return rows of indices, each of at most `budget` distinct tokens (a longer sequence is a row
    of its own), so that little is computed twice. Deterministic.

    The trie is cut into the largest subtrees that fit with their ancestors; in order of size, each
    goes into the row where it adds the fewest tokens, or opens a row. What two rows need is
    computed in both.
    """
    trie = build(sequences, shortest)
    rows: list[tuple[set[int], list[int]]] = []  # nodes, sequences
    for nodes, members in _pieces(trie, budget):
        best, least = None, budget + 1
        for place, (held, _) in enumerate(rows):
            added = int(trie.length[list(nodes - held)].sum())
            size = int(trie.length[list(held)].sum())
            if added < least and size + added <= budget:
                best, least = place, added
        if best is None:
            rows.append((set(nodes), list(members)))
        else:
            rows[best][0].update(nodes)
            rows[best][1].extend(members)
    return [sorted(members) for _, members in rows]


def trees(sequences: Sequence[np.ndarray], shortest: int = SHORTEST) -> list[list[int]]:
    """Return the indices of the sequences of each tree: those with a common beginning."""
    trie = build(sequences, shortest)
    children, ending = _below(trie)
    roots = np.flatnonzero(trie.parent < 0).tolist()
    return [sorted(s for n in _subtree(root, children) for s in ending[n]) for root in roots]


def groups(sequences: Sequence[np.ndarray], most: int, shortest: int = SHORTEST) -> list[list[int]]:
    """Return all indices in groups of at most `most` sequences with a common beginning: the largest
    subtrees of so few. Deterministic.
    """
    trie = build(sequences, shortest)
    children, ending = _below(trie)
    members = np.array([len(sequences_here) for sequences_here in ending])
    for node in range(len(trie.parent) - 1, -1, -1):
        if (parent := int(trie.parent[node])) >= 0:
            members[parent] += members[node]
    found: list[list[int]] = []
    waiting = np.flatnonzero(trie.parent < 0).tolist()
    while waiting:
        node = waiting.pop()
        if members[node] <= most:
            found.append([s for n in _subtree(node, children) for s in ending[n]])
            continue
        here = ending[node]
        found += [here[first : first + most] for first in range(0, len(here), most)]
        waiting += children[node]
    return sorted(sorted(group) for group in found)


def _below(trie: Trie) -> tuple[list[list[int]], list[list[int]]]:
    """The children of each node, and the sequences that end in it."""
    children: list[list[int]] = [[] for _ in trie.length]
    ending: list[list[int]] = [[] for _ in trie.length]
    for node, parent in enumerate(trie.parent.tolist()):
        if parent >= 0:
            children[parent].append(node)
    for sequence, node in enumerate(trie.end.tolist()):
        ending[node].append(sequence)
    return children, ending


def _pieces(trie: Trie, budget: int) -> list[tuple[set[int], list[int]]]:
    """Return (nodes with all ancestors, sequences) of the largest subtrees within `budget`, by
    falling size.
    """
    below = trie.length.copy()  # tokens of a node and of everything below it
    above = np.zeros_like(trie.length)  # tokens of a node's ancestors
    children, ending = _below(trie)
    for node in range(len(trie.length) - 1, -1, -1):
        if (parent := int(trie.parent[node])) >= 0:
            below[parent] += below[node]
    pieces = []
    waiting = np.flatnonzero(trie.parent < 0).tolist()
    while waiting:
        node = waiting.pop()
        path = set(trie.path(node))
        if above[node] + below[node] > budget and children[node]:
            for child in children[node]:
                above[child] = above[node] + trie.length[node]
            waiting += children[node]
            if ending[node]:
                pieces.append((path, ending[node]))
            continue
        inside = _subtree(node, children)
        pieces.append((path | set(inside), [s for n in inside for s in ending[n]]))
    size = {id(piece): int(trie.length[list(piece[0])].sum()) for piece in pieces}
    return sorted(pieces, key=lambda piece: (-size[id(piece)], min(piece[1])))


def _subtree(node: int, children: list[list[int]]) -> list[int]:
    found, waiting = [], [node]
    while waiting:
        found.append(waiting.pop())
        waiting += children[found[-1]]
    return found
