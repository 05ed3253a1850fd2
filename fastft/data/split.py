"""Which rows are held out: by a hash of the content, with duplicates and near-duplicates on one
side.

The side of a row depends on nothing but its content (and its duplicates'), so adding rows moves no
other row.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fastft.data.rows import SIGNATURE, RowMarks

BANDS = 4
"""Rows that agree in all four min-hashes of one of the four bands are compared."""
NEAR = 13
"""Rows that agree in so many of the 16 min-hashes are near-duplicates (Jaccard similarity about
0.8 or more).
"""


@dataclasses.dataclass(frozen=True)
class Groups:
    """Rows that belong together: `group` (N,) is the number of the first row of each row's
    group.
    """

    group: np.ndarray
    duplicates: int
    near_duplicates: int


def group_rows(marks: RowMarks) -> Groups:
    """Group rows with equal content, equal questions, or nearly equal content."""
    count = len(marks.content)
    parent = np.arange(count)
    _unite(parent, _equal_edges(marks.content))
    exact = count - len(np.unique(marks.content))
    near = _near_edges(marks.signatures)
    alike = parent.copy()
    _unite(alike, near)
    near_count = len(np.unique(_roots(parent))) - len(np.unique(_roots(alike)))
    _unite(alike, _equal_edges(marks.asked))
    group = _roots(alike)
    group = _without_giants(group, _roots(parent))
    return Groups(group, exact, near_count)


def held_out(marks: RowMarks, groups: Groups, fraction: float) -> np.ndarray:
    """Return which rows (N,) are held out: those of groups whose smallest content hash is below
    `fraction`.

    The smallest of many hashes is small, so that large groups would be held out far more often
    than `fraction` of the time: where a group holds different contents, its smallest hash is
    hashed again.
    """
    count = len(marks.content)
    if fraction <= 0 or count == 0:
        return np.zeros(count, bool)
    smallest = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    largest = np.zeros(count, np.uint64)
    np.minimum.at(smallest, groups.group, marks.content)
    np.maximum.at(largest, groups.group, marks.content)
    mine = np.where(smallest == largest, smallest, _hashed_again(smallest))[groups.group]
    chosen = mine < np.uint64(fraction * 2.0**64)
    if not chosen.any() and count >= 20:
        chosen = mine == mine.min()  # a small dataset gets at least one held-out row
    return np.zeros(count, bool) if chosen.all() else _without_leaks(marks, chosen)


def explain_share(held: np.ndarray, groups: Groups, fraction: float) -> list[str]:
    """Return a sentence that says why clearly more or less than `fraction` of the rows is held
    out; none where not.
    """
    count, rows = len(held), int(held.sum())
    # Three standard deviations of a fair draw, row by row, and at least half of what was asked for.
    usual = max(3 * (count * fraction * (1 - fraction)) ** 0.5, 0.5 * count * fraction)
    if abs(rows - count * fraction) <= usual:
        return []
    sizes = np.bincount(groups.group, minlength=count)
    together, most = int(sizes[sizes > 1].sum()), int(sizes.max())
    why = (
        f"rows that are (nearly) equal or ask the same stay on one side, and {together:,} "
        "rows stand in "
        f"{int((sizes > 1).sum()):,} such groups, the largest of {most:,}"
        if most > 1
        else "a hash of each row decides, and this is how it falls for these rows"
    )
    return [
        f"{rows:,} rows ({rows / count:.1%}) are held out, where data.eval_fraction is "
        f"{fraction:.1%}: {why}"
    ]


def _hashed_again(keys: np.ndarray) -> np.ndarray:
    """Return `keys` (uint64) mixed by the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _without_leaks(marks: RowMarks, chosen: np.ndarray) -> np.ndarray:
    """Give held-out rows back that are nearly equal to a training row (banding compares with one
    row a band only).
    """
    kept = chosen.copy()
    while True:
        near = _near_rows(marks.subset(~kept), marks.subset(kept))
        if not near.any():
            return kept
        kept[np.flatnonzero(kept)[near]] = False
        if kept.sum() * 2 < chosen.sum():
            # all rows are alike: better some leakage, which is reported, than no eval
            return chosen


def leaked(train: RowMarks, held: RowMarks) -> int:
    """Return how many held-out rows are in the training set too: (nearly) equal content, or the
    same question.
    """
    same = np.isin(held.content, train.content) | np.isin(held.asked, train.asked)
    return int((same | _near_rows(train, held)).sum())


def _near_rows(train: RowMarks, held: RowMarks) -> np.ndarray:
    """Return which held-out rows are nearly equal to a training row."""
    edges = _near_edges(np.concatenate([train.signatures, held.signatures]))
    border = len(train.content)
    near = np.zeros(len(held.content), bool)
    near[edges[(edges[:, 0] < border) & (edges[:, 1] >= border), 1] - border] = True
    return near


def _equal_edges(keys: np.ndarray) -> np.ndarray:
    """Return pairs (first row with this key, row), (E, 2)."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    pairs = np.stack([first[inverse], np.arange(len(keys))], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _near_edges(signatures: np.ndarray) -> np.ndarray:
    """Return pairs (earlier, later) of rows that agree in at least NEAR min-hashes, found by
    banding.
    """
    found = [np.zeros((0, 2), np.int64)]
    width = SIGNATURE // BANDS
    for band in range(BANDS):
        pairs = _equal_edges(_band_keys(signatures[:, band * width : (band + 1) * width]))
        for part in np.array_split(pairs, max(1, len(pairs) // 100_000)):
            agree = (signatures[part[:, 0]] == signatures[part[:, 1]]).sum(axis=1)
            found.append(part[agree >= NEAR])
    return np.concatenate(found)


def _band_keys(hashes: np.ndarray) -> np.ndarray:
    """Return one uint64 for the four hashes of each row (N, 4); a chance collision is sorted out
    by comparing.
    """
    keys = np.zeros(len(hashes), np.uint64)
    for column in hashes.T:
        keys = _hashed_again(keys + np.uint64(0x9E3779B97F4A7C15) + column)
    return keys


def _unite(parent: np.ndarray, edges: np.ndarray) -> None:
    """Join the groups of each pair, in place; a group is named by its smallest row."""
    for part in np.array_split(edges, len(edges) // 100_000 + 1):
        # as Python numbers, an edge takes 136 bytes
        for a, b in part.tolist():
            a, b = _root(parent, a), _root(parent, b)
            if a != b:
                parent[max(a, b)] = min(a, b)


def _root(parent: np.ndarray, row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row


def _roots(parent: np.ndarray) -> np.ndarray:
    roots = parent
    while True:
        further = roots[roots]
        if (further == roots).all():
            return roots
        roots = further


def _without_giants(group: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Dissolve groups above a tenth of the rows (one instruction for all rows, say) into their
    exact duplicates.
    """
    sizes = np.bincount(group, minlength=len(group))
    giant = sizes[group] > max(20, len(group) // 10)
    return np.where(giant, exact, group)
