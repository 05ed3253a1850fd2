"""The check that decides about rows without padding on a GPU, run here on real models through both kinds of rows."""

from functools import partial

import numpy as np
import pytest
import torch

from fastft import families
from fastft.data.batches import Segment
from fastft.engines.stock import ENGINE
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.kernels import varlen
from fastft.training.exactness import (
    RowCheck,
    _distance,
    _gradient,
    _without_dropout,
    check_rows,
    choose_rows,
    choose_sharing,
)
from fastft.training.step import Stepper, StepPolicy
from tests.families import FAMILIES, longrope, make_checkpoint

FLOAT32 = partial(torch.autocast, "cpu", torch.bfloat16, enabled=False)
BFLOAT16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A function that returns a family's tiny model with LoRA (and dropout, which the check has to look past)."""
    made = {}

    def make(family):
        if family not in made:
            folder = make_checkpoint(family, tmp_path_factory.mktemp(family.replace(".", "_")))
            eager = "eager" if family in ("gemma2", "gpt-oss") else None
            base, _ = ENGINE.from_pretrained(
                str(folder), dtype=torch.float32, attn_implementation=eager
            )
            made[family] = ENGINE.get_peft_model(base, r=4, lora_dropout=0.1)
        return made[family]

    return make


def sequences(lengths=(60, 33, 90, 24, 100, 12)):
    generator, found = np.random.default_rng(0), []
    for length in lengths:
        ids = generator.integers(0, 250, length)
        labels = ids.copy()
        labels[: 1 + length // 4] = -100
        found.append(Segment(ids, labels))
    return found


def stepper(model, rows, budget=1000):
    return Stepper(model, ENGINE, StepPolicy(budget, rows, 0), device="cpu", on_note=print)


@pytest.mark.parametrize("context", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_rows_are_found_exact(model_of, family, context):
    found = check_rows(stepper(model_of(family), "varlen"), sequences(), context)
    assert found.exact, found.reason
    assert (found.sequences, found.tokens) == (6, 319)
    if context is FLOAT32:
        assert found.error < 1e-9
        assert found.loss_error < 1e-5
    assert found.leak > 0.05


def test_sequences_on_both_sides_of_a_longrope_are_kept_apart(tmp_path):
    """A sequence above 128 tokens would make all others of its row take its positions, too."""
    folder = make_checkpoint(
        "phi3", tmp_path, rope_parameters=longrope(), sliding_window=None,
        original_max_position_embeddings=128,
    )  # fmt: skip
    base, _ = ENGINE.from_pretrained(str(folder), dtype=torch.float32)
    model, segments = ENGINE.get_peft_model(base, r=4), sequences((60, 140, 33, 129, 128))
    at = varlen.rope_changes_at(model)
    assert at == 128
    policies = [
        StepPolicy(budget, rows, 0, rope_changes_at=at)
        for budget, rows in ((1, "padded"), (1000, "padded"), (1000, "varlen"), (1000, "trie"))
    ]
    alone, *others = (
        _gradient(stepper(model, policy.rows), policy, segments, FLOAT32)[1] for policy in policies
    )
    assert [_distance(found, alone) < 1e-9 for found in others] == [True] * 3
    _, mixed = _gradient(stepper(model, "varlen"), StepPolicy(1000, "varlen", 0), segments, FLOAT32)
    assert _distance(mixed, alone) > 1e-6


def talks(seed=0):
    """Conversations with common beginnings of several depths, one of them whole in another, one
    twice, one alone; some of their tokens have a loss that others do not give them.
    """
    generator = np.random.default_rng(seed)
    found = []
    for start, common, length in [(0, 0, 70), (0, 30, 90), (0, 30, 55), (1, 60, 95), (3, 90, 95), (0, 0, 40), (2, 55, 55)]:  # fmt: skip
        ids = generator.integers(0, 250, length)
        if common:
            ids[:common] = found[start].input_ids[:common]
        labels = np.where(generator.random(length) < 0.7, ids, -100)
        labels[0], labels[-1] = -100, ids[-1]
        found.append(Segment(ids, labels))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_trie_rows_give_the_gradient_of_padded_batches(model_of, family):
    model = model_of(family)
    for seed, budget in enumerate([10**6, 150, 1]):
        segments = talks(seed)
        with _without_dropout(model):
            expected, got = (
                _gradient(stepper(model, "padded"), StepPolicy(tokens, rows, 0), segments, FLOAT32)
                for tokens, rows in ((1, "padded"), (budget, "trie"))
            )
        assert got[0] == pytest.approx(expected[0], rel=1e-5)
        a, b = (torch.cat([g.flatten() for g in gradients]) for _, gradients in (got, expected))
        assert float((a - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_shared_beginnings_are_found_exact(model_of, family):
    found = check_rows(stepper(model_of(family), "trie"), [*sequences(), *talks()], BFLOAT16)
    assert found.exact, found.reason
    assert found.sequences > 2


def test_a_sibling_that_is_seen_is_found_out(model_of, monkeypatch):
    honest = varlen.trie_attention

    def faulty(query, key, value, nodes, **kwargs):
        nodes = nodes.clone()
        nodes[2:, 3] = torch.arange(1, len(nodes) - 1)  # each node sees the one before it
        return honest(query, key, value, nodes, **kwargs)

    monkeypatch.setattr(varlen, "trie_attention", faulty)
    found = check_rows(stepper(model_of("llama"), "trie"), talks(), FLOAT32)
    assert not found.exact, found.reason


def test_sequences_that_share_nothing_cannot_be_checked(model_of):
    assert check_rows(stepper(model_of("llama"), "trie"), sequences(), FLOAT32) is None


def test_sharing_is_off_with_its_reason_or_refused(model_of):
    model = model_of("llama")  # has dropout

    def choose(wanted, rows, tested=True):
        return choose_sharing(
            wanted, model, ENGINE, lambda rows: None, rows=rows, tested=tested, longest=100
        )

    for given, why in (
        ("padded", "padded here"),
        ("packed", "no ancestors"),
        ("varlen", "dropout 0.1"),
    ):
        rows, choice = choose("auto", given)
        assert (rows, choice.value) == (given, False)
        assert why in choice.reason
        with pytest.raises(FastFTError, match=why):
            choose(True, given)
    with _without_dropout(model):
        assert choose("auto", "varlen")[0] == "trie"
        assert choose(False, "varlen")[0] == "varlen"
        rows, choice = choose("auto", "varlen", tested=False)
        assert rows == "varlen"
        assert "share a beginning" in choice.reason


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_transformers_own_attention_honours_the_restarting_positions(model_of, family):
    assert check_rows(stepper(model_of(family), "packed"), sequences(), BFLOAT16).exact


def test_a_family_that_ignores_boundaries_is_found_out(model_of):
    # transformers' gpt-oss builds its masks without the positions: sequences see those before them, without a message.
    found = check_rows(stepper(model_of("gpt-oss"), "packed"), sequences(), BFLOAT16)
    assert not found.exact
    assert found.error > 0.01


@pytest.mark.parametrize("context", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "fault", ["no boundaries", "one boundary off by one", "the last boundary missing"]
)
def test_planted_faults_are_found(model_of, fault, context, monkeypatch):
    honest = varlen.varlen_attention

    def faulty(*args, cu_seq_lens_q, **kwargs):
        starts = cu_seq_lens_q.clone()
        if fault == "one boundary off by one":
            starts[2] += 1
        starts = {
            "no boundaries": starts[[0, -1]],
            "the last boundary missing": starts[[*range(len(starts) - 2), -1]],
        }.get(fault, starts)
        return honest(*args, cu_seq_lens_q=starts, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attention", faulty)
    found = check_rows(stepper(model_of("llama"), "varlen"), sequences(), context)
    assert not found.exact, found.reason


def test_a_window_that_only_a_long_row_reaches_is_checked(model_of, monkeypatch):
    model = model_of("mistral")  # its window has 16 tokens
    chosen, long = sequences((9, 12, 11)), sequences((400,))
    assert check_rows(stepper(model, "varlen"), chosen, FLOAT32).long_tokens == 0
    found = check_rows(stepper(model, "varlen"), chosen, FLOAT32, longest=long)
    assert found.exact
    assert (found.long_tokens, found.tokens) == (9 + 400 + 11, 32)
    honest = varlen.varlen_attention

    def forgetful(*args, cu_seq_lens_q, sliding_window=None, **kwargs):
        return honest(*args, cu_seq_lens_q=cu_seq_lens_q, sliding_window=None, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attention", forgetful)
    assert check_rows(stepper(model, "varlen"), chosen, FLOAT32).exact  # too short to tell
    found = check_rows(stepper(model, "varlen"), chosen, FLOAT32, longest=long)
    assert found.long_error > 0.01
    assert not found.exact


def test_nothing_is_compiled_for_the_check(model_of, monkeypatch):
    model, graphs = model_of("llama"), []
    layer = type(model.get_base_model().model.layers[0])
    compiled = torch.compile(layer.forward, backend=lambda graph, _: graphs.append(1) or graph)
    monkeypatch.setattr(layer, "forward", compiled)
    assert check_rows(stepper(model, "varlen"), sequences(), FLOAT32).exact
    assert not graphs


def test_a_loss_that_is_averaged_over_each_micro_batch_is_found(model_of, monkeypatch):
    model = model_of("llama")
    inner = type(model.get_base_model())
    honest = inner.forward
    monkeypatch.setattr(
        inner, "forward", lambda self, *a, num_items_in_batch=None, **k: honest(self, *a, **k)
    )
    found = check_rows(stepper(model, "varlen"), sequences(), FLOAT32)
    assert not found.exact
    assert abs(found.norm_ratio - 1) > 0.01


def test_nothing_is_left_behind(model_of):
    model = model_of("llama")
    before = torch.get_rng_state()
    used = stepper(model, "varlen")
    check_rows(used, sequences(), FLOAT32)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert used.policy == StepPolicy(1000, "varlen", 0)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}


def test_a_row_that_fails_half_way_leaves_no_gradient(model_of, monkeypatch):
    model = model_of("llama")
    inner, calls = type(model.get_base_model()), []
    honest = inner.forward

    def fails_in_the_third_pass(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no kernel for this shape")
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(inner, "forward", fails_in_the_third_pass)
    with pytest.raises(RuntimeError, match="no kernel"):
        check_rows(stepper(model, "varlen"), sequences(), FLOAT32)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_looked_at_fits_the_budget(model_of):
    model = model_of("llama")
    assert check_rows(stepper(model, "varlen", budget=100), sequences(), FLOAT32).tokens <= 100
    assert (
        check_rows(
            stepper(model, "varlen", budget=2000), sequences((900, 800, 700)), FLOAT32
        ).tokens
        == 1500
    )
    assert (
        check_rows(stepper(model, "varlen", budget=1000), sequences((900, 800, 700)), FLOAT32)
        is None
    )
    assert check_rows(stepper(model, "varlen"), sequences((50,)), FLOAT32) is None


GOOD = RowCheck(6, 319, error=1e-5, rounding=1e-5, norm_ratio=1.0, loss_error=1e-4, leak=0.3)
BAD = RowCheck(6, 319, error=0.1, rounding=1e-5, norm_ratio=1.03, loss_error=3e-3, leak=0.15)
CANNOT_TELL = RowCheck(2, 9, error=1e-5, rounding=1e-5, norm_ratio=1.0, loss_error=1e-4, leak=2e-5)


def fails(rows):
    raise TypeError("forward() got an unexpected keyword argument\nand more")


@pytest.mark.parametrize(
    ("check", "rows", "reason"),
    [
        (lambda rows: GOOD, "varlen", "exact here: 6 sequences in one row of 319 tokens"),
        (lambda rows: BAD, "padded", "padded batches, because not exact here: 6 sequences"),
        (lambda rows: CANNOT_TELL, "padded", "padded batches, because not exact here: 2 sequences"),
        (lambda rows: None, "padded", "no two sequences of the first step fit into one row"),
        (
            fails,
            "padded",
            "a row without padding failed: TypeError: forward() got an unexpected keyword argument",
        ),
    ],
)
def test_rows_are_chosen_by_what_was_found(model_of, check, rows, reason):
    chosen, choice = choose_rows(
        "auto", model_of("llama"), ENGINE, check, tested=False, longest=128
    )
    assert chosen == rows
    assert choice.value is (rows != "padded")
    assert reason in choice.reason
    assert "\n" not in choice.reason


def test_a_family_of_the_table_needs_no_look_where_it_was_tested(model_of):
    chosen, choice = choose_rows("auto", model_of("llama"), ENGINE, fails, tested=True, longest=128)
    assert (chosen, choice.reason) == ("varlen", "exact for llama")


def test_a_family_outside_of_the_table_is_looked_at(model_of, monkeypatch):
    monkeypatch.delitem(families.FAMILIES, "llama")
    model = model_of("llama")

    def look(rows):
        return check_rows(stepper(model, rows), sequences(), FLOAT32)

    chosen, choice = choose_rows("auto", model, ENGINE, look, tested=True, longest=128)
    assert chosen == "varlen"
    assert choice.reason.startswith("exact here: 6 sequences")


@pytest.mark.parametrize(("window", "chosen"), [(64, "varlen"), (100, "padded")])
def test_a_window_that_no_sequence_was_longer_than_was_not_seen(
    model_of, monkeypatch, window, chosen
):
    monkeypatch.delitem(families.FAMILIES, "mistral")
    model = model_of("mistral")
    monkeypatch.setattr(model.config, "sliding_window", window)

    def look(rows):
        return check_rows(stepper(model, rows), sequences(), FLOAT32)

    rows, choice = choose_rows("auto", model, ENGINE, look, tested=True, longest=128)
    assert rows == chosen
    if chosen == "padded":
        assert "sliding window 100" in choice.reason
    rows, _ = choose_rows("auto", model, ENGINE, look, tested=True, longest=100)
    assert rows == "varlen"  # no sequence of the run is longer than the window


def test_layers_that_carry_a_state_are_padded_and_it_is_said(model_of):
    rows, choice = choose_rows("auto", model_of("qwen3.5"), ENGINE, fails, tested=True, longest=128)
    assert rows == "padded"
    assert "linear_attention" in choice.reason


def test_padded_is_never_looked_at(model_of):
    assert (
        choose_rows(False, model_of("llama"), ENGINE, fails, tested=False, longest=128)[0]
        == "padded"
    )


def test_asked_for_and_not_exact_is_an_error(model_of):
    with pytest.raises(FastFTError, match=r"padding_free is on, but not exact here.*auto"):
        choose_rows(True, model_of("llama"), ENGINE, lambda rows: BAD, tested=False, longest=128)


def test_out_of_memory_is_not_a_reason_for_padding(model_of):
    def too_large(rows):
        raise CouldNotFinishError("out of memory on a single sequence")

    with pytest.raises(CouldNotFinishError):
        choose_rows("auto", model_of("llama"), ENGINE, too_large, tested=False, longest=128)
