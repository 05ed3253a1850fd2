"""The CPU's fused layers: compiled kernels against their torch form, and each layer against autograd over the plain one."""

import contextlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastft.data import trie
from fastft.data.batches import Segment
from fastft.engines.stock import ENGINE
from fastft.errors import CouldNotFinishError
from fastft.kernels import native
from fastft.kernels.fused import FusedLayers, head_loss, pair_loss
from fastft.kernels.row_attention import plan_nodes, plan_row, row_attention
from fastft.training.step import Stepper, StepPolicy, recomputed_layers

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(params=["AMX", "AVX512"])
def registers(request):
    """Both kinds of registers that compiled products can go through, on processors that have them."""
    if request.param == "AMX" and not native.has_amx():
        pytest.skip("no AMX on this processor, not granted by its system, or no compiler")
    if request.param == "AVX512" and native.has_tiles():
        native.library().use_amx(0)
    yield request.param
    if native.has_tiles():
        native.library().use_amx(1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def both(request, monkeypatch):
    """A function that runs another with the compiled kernels and with torch's operations."""
    if native.library() is None:
        pytest.skip(f"no compiled kernels: {native.why_not()}")
    dtype = request.param

    def run(function, *shapes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
        compiled = function(*[t.clone() for t in tensors])
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            plain = function(*[t.clone() for t in tensors])
        for a, b in zip(compiled, plain, strict=True):
            assert a.dtype == b.dtype
            assert relative(a, b) < TOLERANCE[dtype]

    return run


SUMS = {  # rows, columns, depths of the terms, which of them hold A and B transposed, bias, float32 out
    "whole tiles": (64, 256, [64, 32], "nt nn", False, False),
    "a gradient of B, whole tiles": (32, 128, [96], "tn", False, True),
    "rows and columns beside a tile": (49, 144, [96, 16], "nt nt", True, False),
    "a layer with LoRA and bias": (70, 130, [576, 16], "nt nt", True, False),
    "a gradient of the input": (70, 96, [130, 20, 48], "nn nn nn", False, False),
    "a gradient of A, odd depth": (16, 200, [301], "tn", False, True),
    "deeper than one block of the cache": (50, 40, [4500, 3000], "nn nt", True, False),
    "one row, one column": (1, 1, [2], "nt", False, False),
    "more rows than one task": (1500, 17, [64], "nn", False, True),
    "many short terms": (30, 64, [2] * 80, " ".join(["nt"] * 80), False, True),
}


@pytest.mark.parametrize("kind", SUMS)
def test_sums_of_products(kind, registers):
    rows, columns, depths, layouts, with_bias, wide = SUMS[kind]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    def stored(layout, *shape):
        wider = (
            draw(shape[0] + 2, shape[1] + 4)
            if layout == "n"
            else draw(shape[1] + 2, shape[0] + 4).t()
        )
        return wider[: shape[0], : shape[1]]  # rows are not next to each other

    terms = [
        (stored(a, rows, depth), stored(b, depth, columns))
        for depth, (a, b) in zip(depths, layouts.split(), strict=True)
    ]
    bias = draw(columns) if with_bias else None
    whole = torch.full(
        (rows + 1, columns + 3), 7.0, dtype=torch.float32 if wide else torch.bfloat16
    )
    other = torch.empty(3, 5, dtype=torch.bfloat16)
    left, right = draw(3, 8), draw(8, 5)
    sums = [native.Sum(whole[:rows, :columns], terms, bias), native.Sum(other, [(left, right)])]
    if native.tiles_serve(torch.bfloat16):
        assert all(native._is_compiled(s) for s in sums)
    native.multiply(*sums)
    expected = sum(a.double() @ b.double() for a, b in terms) + (
        0 if bias is None else bias.double()
    )
    assert relative(whole[:rows, :columns], expected) < (
        2e-6 if wide else 4e-3
    ) or not native.tiles_serve(torch.bfloat16)
    assert relative(whole[:rows, :columns], expected) < 2e-2
    assert relative(other, left.double() @ right.double()) < 1e-2
    assert (whole[rows:] == 7).all(), "nothing is written outside"
    assert (whole[:, columns:] == 7).all()


def test_layouts_that_do_not_pair_go_to_torch():
    odd = torch.randn(4, 7, dtype=torch.bfloat16), torch.randn(7, 3, dtype=torch.bfloat16)
    out = torch.empty(4, 3, dtype=torch.bfloat16)
    assert not native._is_compiled(native.Sum(out, [odd]))
    native.multiply(native.Sum(out, [odd]))
    assert relative(out, odd[0].double() @ odd[1].double()) < 1e-2


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(both, plus_one):
    def norm(x, weight, dy):
        y, rstd = native.rms_forward(x, weight, 1e-6, plus_one)
        return y, rstd, native.rms_backward(dy, x, weight, rstd, plus_one)

    both(norm, (37, 96), (96,), (37, 96))


@pytest.mark.parametrize("gelu", [False, True])
def test_gated_activation(both, gelu):
    def glu(gate, up, dh):
        h = native.glu_forward(gate, up, gelu)
        again = native.glu_backward_(dh, gate, up, gelu)
        return h, again, gate, up

    both(glu, (37, 96), (37, 96), (37, 96))


@pytest.mark.parametrize("window", [2**40, 7])
def test_softmax(both, window):
    def softmax(scores, grad):
        native.softmax_forward_(
            scores, group=3, first_query=32, first_key=32, window=window, scale=0.3
        )
        native.softmax_backward_(scores, grad, 0.3)
        return scores, grad

    both(softmax, (2, 96, 32), (2, 96, 32))


def test_heads_are_packed_and_unpacked(both):
    plan = plan_row([0, 5, 38, 70])

    def layout(rows, cos, sin):
        blocks = native.pack_heads(rows, (cos, sin), plan.table, (2, 3, 8))
        return blocks, native.unpack_heads(blocks, (cos, sin), plan.table, (2, 3, 8), 70)

    both(layout, (70, 48), (70, 8), (70, 8))


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_cross_entropy(both, cap):
    targets = torch.arange(11) * 7 % 90

    def loss(logits):
        logits *= 5
        losses = native.cross_entropy_(logits, targets, factor=0.5, cap=cap, backward=True)
        return losses, logits

    both(loss, (11, 90))


def test_a_value_that_is_not_a_number_stays_one():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.zeros(2, 40, dtype=dtype)
        logits[1, 3] = float("nan")
        losses = native.cross_entropy_(
            logits, torch.tensor([1, 1]), factor=1.0, cap=0.0, backward=True
        )
        assert not losses[0].isnan()
        assert losses[1].isnan()
        x = torch.full((1, 8), float("nan"), dtype=dtype)
        assert native.glu_forward(x, x, False).isnan().all()
        assert native.rms_forward(x, torch.ones(8, dtype=dtype), 1e-6, False)[0].isnan().all()


def attention_by_sequence(q, k, v, rotary, edges, dim, scale, window):
    """What row_attention stands for: SDPA on each sequence, (T, H dim)."""
    pieces = []
    for a, b in itertools.pairwise(edges):
        qs, ks, vs = (t[a:b].view(1, b - a, -1, dim).transpose(1, 2) for t in (q, k, v))
        if rotary is not None:
            cos, sin = (t[a:b] for t in rotary)
            qs, ks = (
                x * cos + torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1) * sin
                for x in (qs, ks)
            )
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)[None]
        mask = (distance >= 0) & (distance < (window or b - a))
        piece = F.scaled_dot_product_attention(
            qs, ks, vs, attn_mask=mask, scale=scale, enable_gqa=True
        )
        pieces.append(piece.transpose(1, 2).reshape(b - a, -1))
    return torch.cat(pieces)


ATTENTIONS = {  # lengths, heads of keys, queries for each, dim, window
    "lengths around every block's edge": ([700, 33, 33, 1, 260], 2, 3, 16, None),
    "a window inside a block": ([700, 33, 33, 1, 260], 2, 3, 16, 20),
    "a window over several blocks": ([700, 65, 64, 63], 1, 2, 64, 300),
    "one head": ([129, 5], 1, 1, 32, None),
    "many heads a key, odd": ([97, 3], 1, 13, 48, None),
    "heads of 128, a window of two": ([70, 200], 2, 4, 128, 2),
    "heads of 80": ([301], 1, 8, 80, 100),
    "whole tiles": ([128, 64], 2, 4, 64, None),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled layout", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention_in_blocks_equals_sdpa_on_each_sequence(kind, dtype, compiled, monkeypatch):
    monkeypatch.setattr(native, "attends", lambda *_: False)
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    check_attention(kind, dtype)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_compiled_attention_equals_sdpa_on_each_sequence(kind, registers):
    if not native.attends(torch.bfloat16, ATTENTIONS[kind][3]):
        pytest.skip("no AVX512-BF16 on this processor, or no compiler")
    check_attention(kind, torch.bfloat16)


def check_attention(kind, dtype):
    lengths, kv, group, dim, window = ATTENTIONS[kind]
    edges = [0, *itertools.accumulate(lengths)]
    check_against_float64(
        lambda *qkvr: row_attention(*qkvr, plan_row(edges), dim, 0.25, window),
        lambda *qkvr: attention_by_sequence(*qkvr, edges, dim, 0.25, window),
        (edges[-1], kv, group, dim),
        dtype,
    )


def check_against_float64(attend, reference, shape, dtype):
    """Compare outputs and gradients on random numbers; `shape`: tokens, heads of keys, queries for each, dim."""
    tokens, kv, group, dim = shape
    generator = torch.Generator().manual_seed(0)
    numbers = [
        torch.randn(tokens, n * dim, generator=generator).to(dtype) for n in (kv * group, kv, kv)
    ]
    grad = torch.randn(tokens, kv * group * dim, generator=generator).to(dtype)
    angle = torch.randn(tokens, dim // 2, generator=generator).repeat(1, 2)
    rotary = (angle.cos().to(dtype), angle.sin().to(dtype)) if dim != 16 else None

    def outputs(attend, wide):
        leaves = [t.to(wide).requires_grad_() for t in numbers]
        out = attend(*leaves, rotary and tuple(t.to(wide) for t in rotary))
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(wide))

    got, expected = outputs(attend, dtype), outputs(reference, torch.float64)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]


TRIES = {  # sequences as (shared with which other, how far; length), heads, queries each, dim, window
    "one beginning, ends around a panel's edge": ([(0, 0, 200), (0, 130, 131), (0, 130, 250), (0, 130, 194)], 2, 3, 64, None),
    "a conversation": ([(0, 0, 70), (0, 64, 150), (1, 128, 129), (1, 140, 300), (3, 299, 310)], 1, 4, 32, None),
    "two trees and a window": ([(0, 0, 90), (0, 40, 100), (2, 0, 33), (2, 5, 200), (3, 150, 160)], 2, 2, 16, 30),
    "a window of two": ([(0, 0, 30), (0, 20, 40)], 1, 2, 32, 2),
    "a window over several nodes": ([(0, 0, 300), (0, 70, 200), (1, 135, 180), (2, 136, 400)], 1, 13, 48, 100),
    "single tokens": ([(0, 0, 1), (0, 1, 2), (1, 2, 3), (1, 2, 70), (0, 0, 5)], 2, 1, 128, None),
}  # fmt: skip


def trie_of(kind):
    generator = np.random.default_rng(0)
    sequences = []
    for with_which, common, length in TRIES[kind][0]:
        own = generator.integers(0, 10**6, length)
        own[:common] = sequences[with_which][:common] if common else own[:common]
        sequences.append(own)
    return trie.build(sequences, shortest=1)


def attention_by_path(q, k, v, rotary, found, dim, scale, window):
    """What attention over a trie stands for: SDPA on each node's whole path, of which its end is
    kept.
    """
    pieces = []
    for node in range(len(found.start)):
        table = found.table[found.path(node)].tolist()
        places = torch.cat([torch.arange(start, start + length) for start, length, *_ in table])
        path = tuple(t[places] for t in (q, k, v))
        turned = rotary and tuple(t[places] for t in rotary)
        out = attention_by_sequence(*path, turned, [0, len(places)], dim, scale, window)
        pieces.append(out[-table[-1][1] :])
    return torch.cat(pieces)


@pytest.mark.parametrize("kind", TRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_attention_over_a_trie_equals_sdpa_on_each_path(kind, dtype, monkeypatch):
    monkeypatch.setattr(native, "attends", lambda *_: False)
    check_trie_attention(kind, dtype)


@pytest.mark.parametrize("kind", TRIES)
def test_compiled_attention_over_a_trie_equals_sdpa_on_each_path(kind, registers):
    if not native.attends(torch.bfloat16, TRIES[kind][3]):
        pytest.skip("no AVX512-BF16 on this processor, or no compiler")
    check_trie_attention(kind, torch.bfloat16)


def check_trie_attention(kind, dtype):
    _, kv, group, dim, window = TRIES[kind]
    found = trie_of(kind)
    plan = plan_nodes(torch.from_numpy(found.table))
    check_against_float64(
        lambda *qkvr: row_attention(*qkvr, plan, dim, 0.25, window),
        lambda *qkvr: attention_by_path(*qkvr, found, dim, 0.25, window),
        (found.tokens, kv, group, dim),
        dtype,
    )


def test_compiled_attention_keeps_what_is_not_a_number(registers):
    if not native.attends(torch.bfloat16, 32):
        pytest.skip("no AVX512-BF16 on this processor, or no compiler")
    q, k, v = (torch.ones(100, 32, dtype=torch.bfloat16) for _ in range(3))
    k[70] = float("nan")
    out = row_attention(q, k, v, None, plan_row([0, 50, 100]), 32, 1.0, None)
    assert out[70:].isnan().all()
    assert not out[:70].isnan().any()


def test_the_loss_counts_only_supervised_tokens():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 300, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (1, 300), generator=generator)
    labels[:, :20] = -100
    labels[:, 200:210] = -100
    got = head_loss(hidden, weight, labels, 7.0)
    expected = F.cross_entropy((hidden @ weight.t())[0, :-1], labels[0, 1:], reduction="sum") / 7
    torch.testing.assert_close(got, expected)
    a, b = (torch.autograd.grad(loss * 3, hidden)[0] for loss in (got, expected))
    assert relative(a, b) < 2e-6


# --- whole models


def make_model(dtype=torch.float32, intermediate=160, change=None, **lora):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=1024,
    )  # fmt: skip
    settings = {"r": 4, "target_modules": "all-linear", "lora_alpha": 8, **lora}
    base = LlamaForCausalLM(config).to(dtype)
    if change is not None:
        change(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return model.train()


def rows(lengths=(300, 40, 17, 129, 64, 2)):
    generator = torch.Generator().manual_seed(2)
    result = []
    for length in lengths:
        ids = torch.randint(0, 200, (length,), generator=generator).numpy()
        labels = ids.copy()
        labels[: 1 + length // 4] = -100
        result.append(Segment(ids, labels))
    return result


def gradient(model, segments, budget, *, padded=False, fused=None, autocast=False, rows=None):
    policy = StepPolicy(budget, rows or ("padded" if padded else "varlen"), 0)
    stepper = Stepper(model, ENGINE, policy, device="cpu", on_note=print, fused=fused)
    model.zero_grad()
    total = stepper.gradient(
        model,
        segments,
        torch.Tensor.backward,
        lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    )
    return total, torch.cat(
        [p.grad.float().flatten() for p in model.parameters() if p.requires_grad]
    )


KINDS = {
    "all linear layers": {},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "rank-stabilised": {"use_rslora": True},
    "DoRA keeps peft's forward": {"use_dora": True},
    "trained token rows keep the stock head": {"trainable_token_indices": [3, 5]},
    "the head has an adapter": {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    "trained biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [True, False])
def test_the_gradient_is_the_padded_one(kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    model = make_model(**KINDS[kind])
    fused = FusedLayers(model, torch.float32)
    reference_loss, reference = gradient(model, rows(), 10**6, padded=True)
    for budget in (60, 10**6):
        loss, got = gradient(model, rows(), budget, fused=fused)
        assert abs(loss - reference_loss) < 1e-5
        assert relative(got, reference) < 1e-5


def talks(lengths=((0, 150), (100, 130), (100, 300), (280, 290), (100, 100), (0, 40))):
    """Sequences that begin as the one before them does, for as many tokens as the first number."""
    generator, result = torch.Generator().manual_seed(3), []
    for common, length in lengths:
        ids = torch.randint(0, 200, (length,), generator=generator).numpy()
        ids[:common] = result[-1].input_ids[:common] if common else ids[:common]
        labels = ids.copy()
        labels[: 1 + length // 4] = -100
        result.append(Segment(ids, labels))
    return result


@pytest.mark.parametrize("kind", [*KINDS, "checkpointed"])
def test_the_gradient_of_a_trie_row_is_the_padded_one(kind):
    model = make_model(**KINDS.get(kind, {}))
    reference_loss, reference = gradient(model, talks(), 10**6, padded=True)
    if kind == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    fused = FusedLayers(model, torch.float32)
    for budget in (160, 10**6):
        loss, got = gradient(model, talks(), budget, fused=fused, rows="trie")
        assert abs(loss - reference_loss) < 1e-5
        assert relative(got, reference) < 1e-5


def test_a_tree_keeps_no_more_than_the_rows_that_it_replaces():
    """A stem of 200 tokens and four ends of 60 in one row, in the room of one sequence."""
    dtype = torch.bfloat16
    assert FusedLayers(make_model(), torch.float32).stretch == 1.0
    if not native.attends(dtype, 16):
        pytest.skip("no AVX512-BF16 on this processor, or no compiler")
    segments = talks([(0, 260), *[(200, 260)] * 3])
    model = make_model(dtype)
    fused = FusedLayers(model, dtype)
    assert 1.7 < fused.stretch < 2.2
    policy = StepPolicy(260, "trie", 0)
    stepper = Stepper(model, ENGINE, policy, device="cpu", on_note=print, fused=fused)
    (batch,) = stepper.batches(segments)
    assert (batch.unique_tokens, batch.keeps) == (440, 260)
    sizes = {}
    for rows_of_step in ("varlen", "trie"):
        sizes[rows_of_step] = 0

        def pack(tensor, kind=rows_of_step, seen=set()):  # noqa: B006
            if tensor.data_ptr() not in seen and tensor.shape[:1] != (200,):  # no weight
                seen.add(tensor.data_ptr())
                sizes[kind] += tensor.nbytes
            return tensor

        part = segments[:1] if rows_of_step == "varlen" else segments
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, got = gradient(model, part, 260, fused=fused, autocast=True, rows=rows_of_step)
    assert sizes["trie"] <= 1.02 * sizes["varlen"]
    whole_loss, whole = gradient(model, segments, 10**6, fused=fused, autocast=True, rows="trie")
    assert loss == whole_loss
    assert torch.equal(got, whole), "computed again by the same kernels on the same numbers"


def test_a_tree_that_does_not_fit_is_cut_to_single_sequences():
    if not native.attends(torch.bfloat16, 16):
        pytest.skip("no AVX512-BF16 on this processor, or no compiler")
    segments, model = talks([(0, 260), *[(200, 260)] * 3]), make_model(torch.bfloat16)
    _, reference = gradient(model, segments, 10**6, autocast=True)
    passes = []

    def note(mlp, inputs):
        passes.append(inputs[0].shape[1])
        if passes[-1] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(note)
    fused = FusedLayers(model, torch.bfloat16)
    _, got = gradient(model, segments, 260, fused=fused, autocast=True, rows="trie")
    assert passes[0] > 400
    assert len(passes) == 5
    assert max(passes[1:]) < 300
    assert float(F.cosine_similarity(got, reference, dim=0)) > 0.999


@pytest.mark.long
def test_thirty_steps_on_trie_rows_are_those_on_padded_batches():
    traces = []
    for padded in (True, False):
        model, generator = make_model(), np.random.default_rng(0)
        fused = None if padded else FusedLayers(model, torch.float32)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(30):
            lengths = [(0, 60), *((int(n), int(n) + 30) for n in generator.integers(20, 50, 5))]
            loss, _ = gradient(
                model,
                talks(lengths),
                200,
                padded=padded,
                fused=fused,
                rows=None if padded else "trie",
            )
            optimizer.step()
            losses.append(loss)
        traces.append(losses)
    assert traces[0][-1] < traces[0][0]
    assert traces[1] == pytest.approx(traces[0], rel=1e-5)


def test_what_many_sequences_predict_counts_as_often():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 600, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator)
    # The head goes through 256 rows at a time.
    pairs = torch.stack(
        [
            torch.randint(0, 600, (700,), generator=generator),
            torch.randint(0, 50, (700,), generator=generator),
            torch.randint(1, 9, (700,), generator=generator),
        ]
    )
    got = pair_loss(hidden, weight, pairs, 7.0)
    losses = F.cross_entropy((hidden[0] @ weight.t())[pairs[0]], pairs[1], reduction="none")
    expected = (losses * pairs[2]).sum() / 7
    torch.testing.assert_close(got, expected)
    a, b = (torch.autograd.grad(loss * 3, hidden)[0] for loss in (got, expected))
    assert relative(a, b) < 2e-6


def test_bfloat16_is_as_close_to_float32_as_peft_is():
    exact, model = make_model(), make_model(torch.bfloat16)
    with torch.no_grad():  # the same numbers on both sides: the rounded base, the float32 adapter
        for a, b in zip(exact.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    _, reference = gradient(exact, rows(), 10**6, padded=True)
    fused = FusedLayers(model, torch.bfloat16)
    _, got = gradient(model, rows(), 500, fused=fused, autocast=True)
    assert float(F.cosine_similarity(got, reference, dim=0)) > 0.999
    _, reference = gradient(exact, talks(), 10**6, padded=True)
    _, got = gradient(model, talks(), 500, fused=fused, autocast=True, rows="trie")
    assert float(F.cosine_similarity(got, reference, dim=0)) > 0.999


def nf4(rows, columns, nested=True):
    from bitsandbytes.nn import Params4bit

    weight = (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)).mul(0.02).bfloat16()
    )
    return Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=nested).to(
        "cpu"
    )


@pytest.mark.parametrize("shape", [(96, 128), (577, 192), (520, 4160)], ids=str)
def test_products_with_nf4_are_those_with_bitsandbytes_numbers(shape, registers):
    if not native.has_tiles():
        pytest.skip("no AVX512-BF16 on this processor, or no compiler")
    for nested in (True, False):
        weight = native.Quantised(nf4(*shape, nested))
        assert native.serves_nf4(weight.parameter, torch.bfloat16)
        for matrix in (weight, weight.t()):
            if matrix.shape[0] % 2:
                continue  # an odd summed index is left to torch
            whole = matrix.whole()
            x = torch.randn(70, matrix.shape[0]).bfloat16()
            got, expected = (torch.empty(70, matrix.shape[1]).bfloat16() for _ in range(2))
            native.multiply(native.Sum(got, [(x, matrix), (x, matrix)]))
            native.multiply(native.Sum(expected, [(x, whole), (x, whole)]))
            assert got.equal(expected)


def test_nf4_layers_are_fused_and_as_close_to_float32_as_peft_is():
    if not native.has_tiles():
        pytest.skip("no AVX512-BF16 on this processor, or no compiler")
    from bitsandbytes.nn import Linear4bit

    def quantise(base):
        for name, layer in list(base.named_modules()):
            if type(layer) is torch.nn.Linear and name != "lm_head":
                rows, columns = layer.weight.shape
                small = Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16)
                small.weight = nf4(rows, columns)
                parent, _, leaf = name.rpartition(".")
                setattr(base.get_submodule(parent), leaf, small)
        base.is_loaded_in_4bit = True

    exact = make_model(intermediate=192)
    model = make_model(torch.bfloat16, intermediate=192, change=quantise)
    small = dict(model.named_parameters())
    for name, wide in exact.named_parameters():
        given = small[name]
        quantised = hasattr(given, "quant_state")
        wide.data.copy_(native.Quantised(given).whole() if quantised else given.data)
    _, reference = gradient(exact, talks(), 10**6, padded=True)
    fused = FusedLayers(model, torch.bfloat16)
    kinds = [type(module).__name__ for module, _ in fused.forwards]
    assert {"LlamaMLP", "LlamaAttention"} <= set(kinds)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in fused.adapters} == {id(p) for p in trained}
    _, got = gradient(model, talks(), 500, fused=fused, autocast=True, rows="trie")
    assert float(F.cosine_similarity(got, reference, dim=0)) > 0.999


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradient(reentrant):
    model = make_model()
    _, reference = gradient(model, rows(), 10**6, padded=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, got = gradient(model, rows(), 300, fused=FusedLayers(model, torch.float32))
    assert relative(got, reference) < 1e-5


def long_rows_recomputed(budget, above, on_pass=lambda tokens, recomputed: None):
    """A stepper on layers that are recomputed in rows above `above` tokens, and its list of what
    went through the first layer's MLP: (tokens, whether the layer is recomputed).
    """
    model, passes = make_model(), []
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    layer = model.get_base_model().model.layers[0]

    def note(mlp, inputs):
        passes.append((inputs[0].shape[1], bool(layer.gradient_checkpointing)))
        on_pass(*passes[-1])

    layer.mlp.register_forward_pre_hook(note)
    policy = StepPolicy(budget, "varlen", 0, recompute_above=above)
    fused = FusedLayers(model, torch.float32)
    return Stepper(model, ENGINE, policy, device="cpu", on_note=str, fused=fused), passes


def gradient_of(stepper, segments):
    stepper.gradient(stepper.model, segments, torch.Tensor.backward, contextlib.nullcontext)
    return torch.cat(
        [p.grad.float().flatten() for p in stepper.model.parameters() if p.requires_grad]
    )


def test_rows_that_fit_without_it_are_not_recomputed():
    _, reference = gradient(make_model(), rows(), 10**6, padded=True)
    stepper, passes = long_rows_recomputed(150, 150)
    assert relative(gradient_of(stepper, rows()), reference) < 1e-5
    # Rows of 300, 129 + 17 + 2 and 64 + 40 tokens, each up to a multiple of 32.
    assert sorted(passes) == [(128, False), (160, False), (320, True), (320, True)]
    assert all(m.gradient_checkpointing for m in recomputed_layers(stepper.model))
    assert recomputed_layers(stepper.model)


def test_out_of_memory_recomputes_more_rows_until_they_fit():
    def too_much(tokens, recomputed):
        if tokens > 128 and not recomputed:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    _, reference = gradient(make_model(), rows(), 10**6, padded=True)
    stepper, passes = long_rows_recomputed(320, 320, too_much)
    assert relative(gradient_of(stepper, rows()), reference) < 1e-5
    assert (stepper.policy.micro_batch_tokens, stepper.policy.recompute_above) == (80, 80)
    assert {tokens for tokens, recomputed in passes if recomputed} == {320, 160}


def test_out_of_memory_in_rows_that_are_all_recomputed_is_the_end():
    def always(tokens, recomputed):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    stepper, passes = long_rows_recomputed(64, 64, always)
    with pytest.raises(CouldNotFinishError, match="single sequence of 300 tokens"):
        gradient_of(stepper, rows())
    assert passes
    assert stepper.policy.recompute_above < 2  # no sequence of rows() is that short


def test_rows_made_ready_are_taken_once_and_only_for_their_own_step():
    stepper = Stepper(
        make_model(), ENGINE, StepPolicy(150, "varlen", 0), device="cpu", on_note=print
    )
    made, batches = [], stepper.batches
    stepper.batches = lambda segments: made.append(len(segments)) or batches(segments)
    expected = gradient_of(stepper, rows())

    def again(segments):
        made.clear()
        stepper.model.zero_grad()
        return relative(gradient_of(stepper, segments), expected)

    stepper.make_ready(rows())
    assert (again(rows()), made) == (0.0, [])
    assert (again(rows()), made) == (0.0, [6])
    stepper.make_ready(rows()[:3])
    assert (again(rows()), made) == (0.0, [6])
    stepper.make_ready(rows())
    stepper.policy.micro_batch_tokens = 75  # after an out-of-memory, say
    assert again(rows()) < 1e-5
    assert made == [6]


def test_gradients_are_there_before_a_step_and_not_after_an_evaluation():
    model = make_model()
    fused, trained = (
        FusedLayers(model, torch.float32),
        [p for p in model.parameters() if p.requires_grad],
    )
    with torch.no_grad(), fused.active():
        assert all(p.grad is None for p in trained)
    with fused.active():
        assert all(p.grad is not None and not p.grad.any() for p in trained)
    trained[0].grad.fill_(3.0)
    with fused.active():
        assert (trained[0].grad == 3).all(), "what is accumulated is not thrown away"


def test_the_forwards_are_put_back():
    model = make_model()
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    fused = FusedLayers(model, torch.float32)
    with pytest.raises(ZeroDivisionError), fused.active():
        raise ZeroDivisionError
    assert {
        name: module.__dict__.get("forward") for name, module in model.named_modules()
    } == before


def test_layers_that_are_not_plain_are_left_alone():
    def kinds(**lora):
        return {
            type(module).__name__
            for module, _ in FusedLayers(make_model(**lora), torch.float32).forwards
        }

    assert {"LlamaMLP", "LlamaAttention", "Linear", "LlamaRMSNorm", "LlamaForCausalLM"} == kinds()
    assert kinds(lora_dropout=0.1) == {"LlamaRMSNorm", "LlamaForCausalLM"}
    assert kinds(use_dora=True) == {"LlamaRMSNorm", "LlamaForCausalLM"}
    assert not FusedLayers(make_model(torch.bfloat16), torch.float32).forwards, (
        "another type than the weights'"
    )


def test_without_a_compiler_torch_is_used_and_said(tmp_path):
    code = "from fastft.kernels import native; print(native.why_not(), native.library())"
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip().splitlines()[-1] == "no C++ compiler (g++) on this machine None", (
        done.stderr[-2000:]
    )
