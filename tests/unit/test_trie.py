"""Sequences with common beginnings as one row: nothing lost, nothing twice, whatever the tree."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft.data import trie
from fastft.data.batches import IGNORE, Segment, cut, micro_batches, row_sizes

# Few different tokens, so that beginnings coincide: identical ones, prefixes of others, single
# tokens.
sequences = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=9).map(np.array), min_size=1, max_size=9
)
shortest = st.integers(1, 4)
any_machine = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read_back(found, index):
    """The tokens that a sequence finds on the way from its root to its end."""
    nodes = found.path(int(found.end[index]))
    return np.concatenate([np.arange(s, s + n) for s, n, *_ in found.table[nodes].tolist()])


@any_machine
@given(sequences, shortest)
def test_every_sequence_is_a_path(given_sequences, least):
    row = trie.row_of(given_sequences, given_sequences, ignore=IGNORE, shortest=least)
    for index, sequence in enumerate(given_sequences):
        places = read_back(row.trie, index)
        assert row.input_ids[places].tolist() == sequence.tolist()
        assert row.position_ids[places].tolist() == list(range(len(sequence)))
    ends = row.trie.start + row.trie.length
    assert row.trie.start.tolist() == [0, *ends[:-1].tolist()]
    assert (row.trie.parent < np.arange(len(ends))).all()


@any_machine
@given(sequences)
def test_each_distinct_prefix_is_computed_once(given_sequences):
    prefixes = {tuple(s[: n + 1].tolist()) for s in given_sequences for n in range(len(s))}
    assert trie.build(given_sequences, shortest=1).tokens == len(prefixes)


@any_machine
@given(sequences, shortest)
def test_only_stretches_that_are_long_enough_are_shared(given_sequences, least):
    found = trie.build(given_sequences, least)
    holders = np.zeros(len(found.start), int)
    for end in found.end.tolist():
        holders[found.path(end)] += 1
    assert (found.length[holders > 1] >= least).all()
    assert found.shares == bool((holders > 1).any())


@any_machine
@given(sequences, shortest, st.data())
def test_pairs_are_what_the_sequences_predict(given_sequences, least, data):
    labels = []
    for sequence in given_sequences:
        mask = np.array(
            data.draw(st.lists(st.booleans(), min_size=len(sequence), max_size=len(sequence)))
        )
        labels.append(np.where(mask, sequence, IGNORE))
    row = trie.row_of(given_sequences, labels, ignore=IGNORE, shortest=least)
    expected, got = {}, {}
    for sequence, label in zip(given_sequences, labels, strict=True):
        for at in range(1, len(sequence)):
            if label[at] != IGNORE:
                pair = (tuple(sequence[:at].tolist()), int(label[at]))
                expected[pair] = expected.get(pair, 0) + 1
    prefix = {}
    for index, sequence in enumerate(given_sequences):
        for at, place in enumerate(read_back(row.trie, index).tolist()):
            prefix[place] = tuple(sequence[: at + 1].tolist())
    for state, target, count in zip(row.states, row.targets, row.counts, strict=True):
        pair = (prefix[int(state)], int(target))
        got[pair] = got.get(pair, 0) + int(count)
    assert got == expected


@any_machine
@given(sequences, st.integers(1, 40), shortest)
def test_a_cut_holds_every_sequence_once_and_keeps_the_budget(given_sequences, budget, least):
    rows = trie.cut(given_sequences, budget, least)
    assert sorted(i for row in rows for i in row) == list(range(len(given_sequences)))
    for row in rows:
        chosen = [given_sequences[i] for i in row]
        longest = max(len(sequence) for sequence in chosen)
        assert trie.build(chosen, least).tokens <= max(budget, longest)


@any_machine
@given(sequences, st.integers(1, 5), shortest)
def test_groups_hold_every_sequence_once_and_are_small_enough(given_sequences, most, least):
    found = trie.groups(given_sequences, most, least)
    assert sorted(i for group in found for i in group) == list(range(len(given_sequences)))
    assert all(1 <= len(group) <= most for group in found)
    for group in found:
        chosen = [given_sequences[i] for i in group]
        assert len(chosen) == 1 or trie.build(chosen, least).shares


@any_machine
@given(sequences, shortest)
def test_the_largest_tree_is_what_some_sequences_need_together(given_sequences, least):
    found = trie.build(given_sequences, least)
    roots = [found.path(end)[0] for end in found.end.tolist()]
    sizes = [
        trie.build(
            [s for s, r in zip(given_sequences, roots, strict=True) if r == root], least
        ).tokens
        for root in set(roots)
        if roots.count(root) > 1
    ]
    assert found.largest_tree == max(sizes, default=0)


def test_a_cut_repeats_only_what_two_rows_need():
    system = np.arange(100)
    talks = [np.concatenate([system, np.full(30, 200 + i)]) for i in range(8)]
    rows = trie.cut(talks, 160)
    assert [len(row) for row in rows] == [2, 2, 2, 2]
    assert trie.cut(talks, 340) == [list(range(8))]
    other = [np.full(60, 900 + i) for i in range(2)]
    rows = trie.cut([*talks[:4], *other], 160)
    assert sum(trie.build([[*talks[:4], *other][i] for i in row]).tokens for row in rows) == 440


def test_a_long_chain_of_turns_is_no_deep_recursion():
    turns = [np.arange(n + 1) for n in range(1500)]
    found = trie.build(turns, shortest=1)
    assert found.tokens == len(found.start) == 1500
    assert len(found.path(int(found.end[-1]))) == 1500


def test_nothing_is_a_trie_too():
    assert trie.build([]).tokens == 0
    assert trie.cut([], 10) == trie.groups([], 3) == []


@pytest.mark.parametrize("least", [1, 16])
def test_identical_sequences_are_one(least):
    row = trie.row_of([np.arange(20)] * 3, [np.arange(20)] * 3, ignore=IGNORE, shortest=least)
    assert row.trie.table.tolist() == [[0, 20, 0, -1]]
    assert row.counts.tolist() == [3] * 19


@any_machine
@given(sequences)
def test_trees_are_the_sequences_with_a_common_beginning(given_sequences):
    groups = trie.trees(given_sequences, shortest=1)
    firsts = [{int(given_sequences[i][0]) for i in group} for group in groups]
    assert all(len(first) == 1 for first in firsts)
    assert len(set.union(*firsts)) == len(groups)
    assert sorted(i for group in groups for i in group) == list(range(len(given_sequences)))


@any_machine
@given(sequences, st.integers(1, 20), st.floats(1.0, 3.0))
def test_a_tree_may_be_longer_than_a_row_and_nothing_else(given_sequences, budget, stretch):
    segments = []
    for ids in (np.repeat(sequence, 20) for sequence in given_sequences):
        segments.append(Segment(ids, np.concatenate([[IGNORE], ids[1:]])))
    batches = list(
        micro_batches(
            segments, 20 * budget, rows="trie", pad_token_id=0, device="cpu", stretch=stretch
        )
    )
    assert sum(batch.tokens for batch in batches) == sum(map(len, segments))
    lengths = [len(segment) for segment in segments]
    largest = max(sum(lengths[i] for i in row) for row in cut(lengths, 20 * budget))
    for batch in batches:
        assert batch.keeps in (None, largest)
        most = stretch * largest if batch.keeps else largest
        assert batch.unique_tokens <= most
    sizes = row_sizes(segments, 20 * budget, "trie", stretch=stretch)
    assert [size for size, _ in sizes] == [b.keeps or b.unique_tokens for b in batches]
