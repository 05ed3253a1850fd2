"""How a step is cut: nothing lost, nothing over budget, the order a function of the seed."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.data.batches import (
    IGNORE,
    StepBatches,
    cut,
    cut_padded,
    micro_batches,
    segments_of,
    supervised_tokens,
)

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=40)


def sample(ids, labels=None, segments=None):
    ids = np.asarray(ids, dtype=np.int32)
    labels = ids if labels is None else np.asarray(labels, dtype=np.int32)
    return SimpleNamespace(input_ids=ids, labels=labels, segments=segments or [len(ids)])


@given(lengths, st.integers(1, 400))
def test_rows_hold_every_sequence_once_and_keep_the_budget(sizes, budget):
    rows = cut(sizes, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= budget or len(row) == 1 for row in rows)


@given(lengths, st.integers(1, 400))
def test_first_fit_decreasing_keeps_its_bound(sizes, budget):
    sizes = [min(size, budget) for size in sizes]
    least = -(-sum(sizes) // budget)
    # Every two rows together hold more than a budget, else the second would have been put into the first.
    assert len(cut(sizes, budget)) <= max(1, 2 * least)


@given(lengths, st.integers(1, 400))
def test_padded_batches_keep_the_budget_with_their_padding(sizes, budget):
    batches = cut_padded(sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(len(b) * max(sizes[i] for i in b) <= budget or len(b) == 1 for b in batches)


def test_the_first_label_of_every_segment_is_masked():
    segments = segments_of([sample([5, 6, 7, 8, 9], segments=[2, 3])])
    assert [s.labels.tolist() for s in segments] == [[IGNORE, 6], [IGNORE, 8, 9]]
    assert supervised_tokens(segments) == 3


def test_a_padding_free_row_restarts_positions_and_marks_boundaries():
    segments = segments_of([sample([1, 2, 3]), sample([4, 5])])
    (row,) = micro_batches(segments, 10, rows="varlen", pad_token_id=0, device="meta")
    assert row.inputs["input_ids"].shape == (1, 5)
    (row,) = micro_batches(segments, 10, rows="varlen", pad_token_id=0, device="cpu")
    assert row.inputs["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, *[0] * 27]
    ]  # a tail up to 32 on a CPU
    assert row.inputs["labels"].tolist() == [[IGNORE, 2, 3, IGNORE, 5, *[IGNORE] * 27]]
    assert row.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, *range(27)]]
    assert row.inputs["cu_seq_lens_q"].tolist() == [0, 3, 32]
    assert (row.tokens, row.padded_tokens) == (5, 32)


def test_a_padded_batch_hides_its_padding():
    segments = segments_of([sample([1, 2, 3]), sample([4, 5])])
    (batch,) = micro_batches(segments, 10, rows="padded", pad_token_id=9, device="cpu")
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.inputs["labels"].tolist() == [[IGNORE, 2, 3], [IGNORE, 5, IGNORE]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch.tokens, batch.padded_tokens) == (5, 6)


def test_segments_must_add_up():
    with pytest.raises(AssertionError, match="add up"):
        segments_of([sample([1, 2, 3], segments=[2])])


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(count, batch, epoch):
    steps = StepBatches(list(range(count)), batch, seed=7)
    steps.set_epoch(epoch)
    seen = [i for k in range(len(steps)) for i in steps[k]]
    again = StepBatches(list(range(count)), batch, seed=7)
    again.set_epoch(epoch)
    assert sorted(seen) == list(range(count))
    assert seen == [i for k in range(len(again)) for i in again[k]]


def talk(beginning, own):
    return sample([*range(1000 * beginning, 1000 * beginning + 20), own, own])


def test_grouped_order_brings_common_beginnings_together():
    talks = [talk(n % 5, 10 + n) for n in range(20)]
    steps = StepBatches(talks, 4, seed=7, order="grouped")
    seen = []
    for epoch in (0, 1):
        steps.set_epoch(epoch)
        beginnings = [[int(s.input_ids[0]) for s in steps[k]] for k in range(len(steps))]
        assert all(len(set(step)) == 1 for step in beginnings)
        assert sorted(int(s.input_ids[-1]) for k in range(5) for s in steps[k]) == list(
            range(10, 30)
        )
        seen.append(beginnings)
    assert seen[0] != seen[1], "the groups are shuffled"
    again = StepBatches(talks, 4, seed=7, order="grouped")
    assert [again[k] for k in range(5)] == [
        [talks[i] for i in again.order[4 * k : 4 * k + 4]] for k in range(5)
    ]
    again.set_epoch(1)
    assert again.order.tolist() == steps.order.tolist()


def test_one_beginning_for_all_leaves_the_order_free():
    talks = [talk(0, 10 + n) for n in range(40)]
    steps = StepBatches(talks, 4, seed=7, order="grouped")
    assert all(len(group) == 1 for group in steps.groups)
    assert steps.order.tolist() != list(range(40))


def test_epochs_differ():
    steps = StepBatches(list(range(100)), 100, seed=7)
    first = steps[0]
    steps.set_epoch(1)
    assert steps[0] != first


def test_a_trie_row_holds_a_shared_beginning_once():
    head = list(range(100, 120))
    segments = segments_of(
        [
            sample([*head, 1, 2, 3], [IGNORE] * 20 + [1, 2, 3]),
            sample([*head, 4], [IGNORE] * 20 + [4]),
        ]
    )
    (row,) = micro_batches(segments, 40, rows="trie", pad_token_id=0, device="cpu")
    assert row.inputs["input_ids"].tolist() == [[*head, 1, 2, 3, 4, *[0] * 8]]
    assert row.inputs["position_ids"].tolist() == [[*range(20), 20, 21, 22, 20, *range(8)]]
    assert row.inputs["trie_nodes"].tolist() == [[0, 20, 0, -1], [20, 3, 20, 0], [23, 9, 20, 0]]
    # The state before the branch predicts both continuations.
    assert row.inputs["trie_pairs"].tolist() == [[19, 19, 20, 21], [1, 4, 2, 3], [1, 1, 1, 1]]
    assert (row.tokens, row.unique_tokens, row.padded_tokens) == (44, 24, 32)


def test_sequences_that_share_nothing_are_cut_as_before():
    segments = segments_of([sample([n] * length) for n, length in enumerate([30, 7, 12, 25, 3])])
    plain, shared = (
        list(micro_batches(segments, 40, rows=rows, pad_token_id=0, device="cpu"))
        for rows in ("varlen", "trie")
    )
    for a, b in zip(plain, shared, strict=True):
        assert a.inputs.keys() == b.inputs.keys()
        assert all(a.inputs[name].equal(b.inputs[name]) for name in a.inputs)
