"""One test for each fault that once passed all tests when it was planted (tools/mutate.py)."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastft.bench.case import Tolerances
from fastft.bench.parity import judge
from fastft.config import make_config
from fastft.data import bounded
from fastft.errors import FastFTError
from fastft.exporting.certificate import LIMITS, judge_distance
from fastft.files import Files
from fastft.kernels.varlen import varlen_attention
from fastft.planning.disk import export_term
from fastft.planning.memory import Situation, eval_terms, training_state_terms
from fastft.planning.shape import load_shape
from fastft.runs import checkpoint
from fastft.runs.folder import RunFolder, best_step, out_of_patience
from fastft.runs.mirror import Mirror
from fastft.verification.checks import check_user_text
from tests.unit.test_bench_gate import STEPS, a_run, failed

KEY = "hf_" + "Abcdefghijklmnopqrstuvwxyz012345"


# --- what is whole


def test_a_changed_byte_is_found_where_the_size_is_the_same(tmp_path):
    aside = tmp_path / "aside"
    aside.mkdir()
    for name in checkpoint.REQUIRED:
        (aside / name).write_bytes(b"0123456789")
    checkpoint.seal(aside, tmp_path / "checkpoint-1")
    assert checkpoint.what_is_wrong(tmp_path / "checkpoint-1") is None
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_bytes(b"0123456780")
    assert "optimizer.pt was changed" in checkpoint.what_is_wrong(tmp_path / "checkpoint-1")


def test_what_an_out_of_memory_message_advises_may_change_on_resume():
    values = {"model": {"name": "m"}, "data": {"source": "d"}}
    before = make_config(values).model_dump()
    advised = {"micro_batch_tokens": 256, "gradient_checkpointing": True}
    assert checkpoint.refuse_differences(before, make_config(values | {"train": advised})) == []
    with pytest.raises(FastFTError, match=r"train\.learning_rate was"):
        checkpoint.refuse_differences(
            before, make_config(values | {"train": {"learning_rate": 0.1}})
        )


class LyingAboutTheManifest(Files):
    """Keeps every file but the mirror's own manifest as it was written."""

    def write(self, path, chunks):
        if path.name == f".writing-{checkpoint.MANIFEST}" and path.parent.name == "run":
            chunks = [b"".join(chunks).replace(b"[", b"[ ")]
        super().write(path, chunks)


def test_the_mirrors_own_manifest_is_read_back(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.checkpoints.mkdir()
    run.write_config(make_config({"model": {"name": "m"}, "data": {"source": "d"}}))
    warnings = []
    mirror = Mirror(
        run, tmp_path / "drive" / "run", note=lambda line: None, warn=warnings.append,
        files=LyingAboutTheManifest(), retry_after_seconds=(0.0,),
    )  # fmt: skip
    (tmp_path / "drive").mkdir()
    assert not mirror.close(5.0)
    assert any("manifest.json read back differs" in line for line in warnings)


# --- what the benchmark lets through


def with_losses(folder, name, losses):
    evidence = a_run(folder, name)
    steps = [
        step.model_copy(update={"loss": loss})
        for step, loss in zip(evidence.record.steps, losses, strict=True)
    ]
    return replace(evidence, record=evidence.record.model_copy(update={"steps": steps}))


def test_the_first_loss_and_the_trace_are_each_looked_at(tmp_path):
    limits = Tolerances()
    reference = with_losses(tmp_path, "reference", [4.0, 3.0, 2.0])
    late = with_losses(tmp_path, "late", [4.0, 3.0, 2.0 * (1 + 2 * limits.trace)])
    assert failed(judge(late, reference, STEPS, limits)) == {"loss trace"}
    strict = limits.model_copy(update={"trace": 1.0})
    first = with_losses(tmp_path, "first", [4.0 * (1 + 2 * limits.loss), 3.0, 2.0])
    assert failed(judge(first, reference, STEPS, strict)) == {"step-1 loss"}


# --- what the plan counts


def situation(**changes):
    values = {"device": "cpu", "tokens": 1000, "longest": 1000, "kernels": "eager"}
    values |= {"loss": "full", "compute_bytes": 4, "lora_bytes": 4}
    return Situation(**(values | changes))


def bytes_of(terms, name):
    return sum(term.bytes for term in terms if term.name == name)


def test_adam_has_two_moments_of_each_trained_number():
    shape = load_shape("llama-3.2-1b")
    terms = training_state_terms(shape, situation(optimizer="adamw"))
    assert bytes_of(terms, "optimizer") == 2 * bytes_of(terms, "gradients") > 0


def test_an_evaluation_holds_the_logits_of_its_rows():
    shape = load_shape("llama-3.2-1b")
    terms = eval_terms(shape, situation())
    assert bytes_of(terms, "logits") == 1000 * shape.vocab * (4 + 4 + 4)


def test_a_gguf_export_takes_the_bytes_of_its_type():
    shape = load_shape("llama-3.2-1b")
    sizes = {
        kind: export_term(shape, situation(), f"gguf:{kind}").bytes for kind in ("f16", "q8_0")
    }
    assert sizes["f16"] == pytest.approx(2 * shape.parameters, rel=0.02)
    assert sizes["q8_0"] == pytest.approx(34 / 32 * shape.parameters, rel=0.02)


# --- what a certificate forgives


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_a_kl_beyond_the_limit_fails_whatever_the_perplexity_says(kind):
    measured = {"kl_p99": 1.0, "top1": 0.5, "ppl_ratio": 1.0, "positions": 1000}
    for factor, verdict in ((1.01, "fail"), (0.99, "warn")):
        kl = LIMITS[kind].kl_fail * factor
        assert judge_distance(measured | {"kl_mean": kl}, kind).verdict == verdict
    assert judge_distance(measured | {"kl_mean": math.nan}, kind).verdict == "fail"


@pytest.mark.parametrize(
    ("ids", "verdict"), [([5, 1, 2, 6], "pass"), ([5, 2, 1, 6], "warn"), ([5, 9, 6], "fail")]
)
def test_a_message_whose_control_token_is_read_as_one_is_not_the_trained_model(ids, verdict):
    """Tokens from 9 on are control tokens."""
    file = SimpleNamespace(chat_tokens=lambda messages: ids, is_control=lambda token: token >= 9)
    spelled = {"token": "<|im_end|>", "messages": [], "ids": [5, 1, 2, 6]}
    assert check_user_text(file, {"spelled": [spelled]}).verdict == verdict


def test_a_pattern_that_tries_every_way_to_cut_a_text_ends(monkeypatch):
    monkeypatch.setattr(bounded, "PATTERN_SECONDS", 0.2)  # of this thread's processor
    with pytest.raises(FastFTError, match=r"takes more than 0\.2 s"):
        bounded.matches(r"([a-z_.0-9]+)+X", "model.layers.0.self_attn.q_proj", whole=True)
    assert bounded.matches(r".*\.(q|v)_proj", "model.layers.0.self_attn.q_proj", whole=True)
    assert not bounded.matches("q", "model.layers.0.self_attn.q_proj", whole=True)
    with pytest.raises(FastFTError, match="is no expression"):
        bounded.matches("([", "x")


# --- what is kept, and when it ends


def test_patience_is_not_one_late_and_the_best_is_not_the_last():
    history = [{"step": s, "eval_loss": loss} for s, loss in ((5, 2.0), (10, 1.0), (15, 1.5))]
    assert best_step(history) == 10
    assert out_of_patience(history, 1)
    assert not out_of_patience(history, 2)
    assert out_of_patience([*history, {"step": 20, "eval_loss": 1.2}], 2)


def test_no_key_reaches_the_record_or_a_message(tmp_path):
    run = RunFolder(tmp_path)
    run.update_record(note=f"token {KEY}")
    assert KEY not in (tmp_path / "run.json").read_text()
    assert "***" in run.read_record()["note"]
    with pytest.raises(FastFTError) as raised:
        make_config({"model": {"name": "m"}, "data": {"source": "d"}, "lora": {"r": KEY}})
    assert KEY not in str(raised.value)
    assert "lora.r" in str(raised.value)


# --- what the kernels compute


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_window_of_w_sees_itself_and_the_w_minus_1_before(window, softcap):
    """Against a mask that is written out; both ways of computing it."""
    torch.manual_seed(0)
    lengths, heads, size = (7, 1, 12), 2, 4
    q, k, v = (torch.randn(1, heads, sum(lengths), size) for _ in range(3))
    found, _ = varlen_attention(
        None, q, k, v, None, sliding_window=window, softcap=softcap,
        cu_seq_lens_q=np.cumsum([0, *lengths]).tolist(),
    )  # fmt: skip
    owner = torch.tensor(np.repeat(range(len(lengths)), lengths))
    i = torch.arange(sum(lengths))
    seen = (owner[:, None] == owner) & (i[:, None] >= i) & (i[:, None] < i + window)
    scores = q @ k.mT * size**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-6)


class OnceTooMuch(torch.nn.Module):
    """A model with dropout whose first call runs out of memory behind the dropout."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, 8)
        self.head = torch.nn.Linear(8, 20)
        self.calls, self.dies_at = 0, 0
        self.device = torch.device("cpu")

    def forward(self, input_ids, labels, num_items_in_batch, **_):
        hidden = torch.nn.functional.dropout(self.embedding(input_ids), 0.5)
        self.calls += 1
        if self.calls == self.dies_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits = self.head(hidden)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return SimpleNamespace(loss=loss / num_items_in_batch)


def test_after_an_out_of_memory_the_dropout_is_that_of_a_step_without_one():
    from contextlib import nullcontext

    from fastft.data.batches import Segment
    from fastft.engines import get_engine
    from fastft.training.step import Stepper, StepPolicy

    ids = np.arange(6)
    segments = [Segment(ids, np.where(ids > 0, ids, -100), place=n) for n in range(4)]
    gradients = []
    for dies_at, budget in ((0, 6), (2, 12)):
        torch.manual_seed(0)
        model = OnceTooMuch()
        model.dies_at = dies_at
        notes = []
        stepper = Stepper(
            model, get_engine("stock"), StepPolicy(budget, "padded", 0), device="cpu",
            on_note=notes.append,
        )  # fmt: skip
        torch.manual_seed(1)
        stepper.gradient(model, segments, lambda loss: loss.backward(), nullcontext)
        gradients.append(model.head.weight.grad.clone())
        assert bool(notes) == bool(dies_at)
    assert torch.equal(*gradients)
