"""The MLX engine against plain transformers and peft, in float32. Runs where mlx and mlx-lm are
installed (mlx[cpu]==0.32.4 on Linux); skipped elsewhere. No Mac has run it.
"""

import json

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")

# ruff: noqa: E402 (what follows needs what the lines above found)
import mlx.nn as nn
import torch
from mlx.utils import tree_flatten
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, get_scheduler

from fastft.config import LoraConfig, ModelConfig, TrainConfig
from fastft.data.batches import IGNORE, StepBatches, segments_of, supervised_tokens
from fastft.data.store import Sample
from fastft.engines.mlx import LoraLinear, load_adapter, load_mlx
from fastft.errors import FastFTError
from fastft.training.mlx_loop import MlxTrainer, gradient_of, row_error
from fastft.training.step import StepPolicy
from tests.families import make_checkpoint

FAMILIES = {"llama": {}, "qwen3": {}, "gemma3": {"hidden_size": 96}}
"""gemma3 with a width whose square root bfloat16 does not hold."""
LORA = LoraConfig(r=4, alpha=8)


class Rows(list):
    """Samples, as a dataset."""

    @property
    def lengths(self):
        return [len(sample.input_ids) for sample in self]


def samples(vocabulary, *, count=24, seed=0):
    """Sequences of 5 to 40 tokens; every other one begins with the same 20 tokens."""
    rng = np.random.default_rng(seed)
    beginning, made = rng.integers(3, vocabulary, 20), Rows()
    for at in range(count):
        ids = rng.integers(3, vocabulary, rng.integers(5, 41))
        ids = np.concatenate([beginning, ids[:20]]) if at % 2 else ids
        labels = ids.copy()
        labels[: len(ids) // 3] = IGNORE
        made.append(Sample(ids, labels, [len(ids)]))
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(MLX model, peft model) with the same adapter, whose B is not zero."""
    base = make_checkpoint(
        request.param, tmp_path_factory.mktemp("base"), **FAMILIES[request.param]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    config = PeftConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = get_peft_model(model, config)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter")
    trained.save_pretrained(folder)
    return loaded(base, folder), trained, base, folder


def loaded(base, adapter=None, **keywords):
    how = {"quantization": "none", "dtype": "float32", "seed": 1, "gradient_checkpointing": False}
    model = load_mlx(
        ModelConfig(name=str(base), max_seq_length=64), keywords.pop("lora", LORA),
        train_token_ids=[], **(how | keywords),
    )  # fmt: skip
    if adapter is not None:
        load_adapter(model, adapter)
    return model


def gradient(model, segments, rows, budget=4096):
    compute = nn.value_and_grad(model.model, model.loss_sum)
    loss, found, _ = gradient_of(model, compute, segments, StepPolicy(budget, rows, 0))
    return loss, dict(tree_flatten(found))


def torch_step(model, segments):
    """The reference: each sequence alone, sums over the step's supervised tokens."""
    total, count = 0.0, supervised_tokens(segments)
    for segment in segments:
        logits = model(torch.tensor(segment.input_ids[None])).logits[0, :-1]
        target = torch.tensor(segment.labels[1:])
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total


def test_loss_and_gradient_are_transformers(pair):
    model, reference, *_ = pair
    segments = segments_of(samples(reference.config.vocab_size)[:6])
    loss, found = gradient(model, segments, "trie")
    reference.zero_grad()
    assert loss == pytest.approx(torch_step(reference, segments), abs=1e-5)
    theirs = dict(reference.named_parameters())
    assert len(found) == 2 * len(model.targets)
    for path in model.targets:
        for ours, name in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            expected = theirs[f"base_model.model.{path}.{name}.default.weight"].grad.numpy().T
            error = np.abs(np.array(found[f"{path}.{ours}"]) - expected).max()
            assert error <= 1e-4 * np.abs(expected).max(), path


@pytest.mark.parametrize("rows", ["trie", "varlen"])
def test_rows_are_exact_against_sequences_alone(pair, rows):
    """Boundaries and shared beginnings; the windows of gemma3 (8 tokens) lie inside of both."""
    model, reference, *_ = pair
    segments = segments_of(samples(reference.config.vocab_size)[:8])
    error = row_error(model, segments, StepPolicy(4096, rows, 0))
    assert error is not None
    assert error < 1e-5
    alone, _ = gradient(model, segments, "padded")
    together, _ = gradient(model, segments, rows)
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_row_that_leaks_is_told(pair, monkeypatch):
    """The check at the start can fail: positions that do not restart change the gradient."""
    from fastft.engines import mlx

    model, reference, *_ = pair
    monkeypatch.setattr(mlx, "_seen", lambda length, position, window: None)
    segments = segments_of(samples(reference.config.vocab_size)[:4])
    assert row_error(model, segments, StepPolicy(4096, "trie", 0)) > 1e-2


def test_adapters_are_interchangeable(pair, tmp_path):
    model, reference, base, _ = pair
    ids = samples(reference.config.vocab_size)[1].input_ids
    expected = reference(torch.tensor(ids[None])).logits.detach().numpy()
    assert np.abs(np.array(model.logits(mx.array(ids[None]))) - expected).max() < 1e-4
    model.save_pretrained(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    back = PeftModel.from_pretrained(plain, str(tmp_path))
    assert np.abs(back(torch.tensor(ids[None])).logits.detach().numpy() - expected).max() < 1e-4


def test_checkpointing_changes_nothing(pair):
    model, reference, base, adapter = pair
    again = loaded(base, adapter, gradient_checkpointing=True)
    segments = segments_of(samples(reference.config.vocab_size)[:4])
    loss, found = gradient(model, segments, "trie")
    same, other = gradient(again, segments, "trie")
    assert same == pytest.approx(loss, abs=1e-6)
    for name, array in found.items():
        assert np.allclose(np.array(other[name]), np.array(array), atol=1e-6), name


def trainer_of(model, rows, folder, steps, log, **settings):
    config = TrainConfig(
        effective_batch_size=4, learning_rate=5e-3, save_steps=3, warmup_steps=3, **settings
    )
    return MlxTrainer(
        model, config, train_dataset=rows, eval_dataset=None,
        policy=StepPolicy(64, "trie", 0), total_steps=steps, warmup_steps=3, checkpoints=folder,
        on_log=log.append, save_extra=lambda folder: None,
    )  # fmt: skip


def test_thirty_steps_give_the_losses_of_transformers(pair, tmp_path):
    """AdamW, cosine schedule with warm-up, clipping, order of the data: against torch's own."""
    model, reference, base, adapter = pair
    model, rows, log = loaded(base, adapter), samples(reference.config.vocab_size), []
    trainer_of(model, rows, tmp_path, 30, log).train()
    plain = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    trained = PeftModel.from_pretrained(plain, str(adapter), is_trainable=True)
    weights = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, 3, 30)
    steps, losses, norms = StepBatches(rows, 4, TrainConfig().seed), [], []
    for step in range(30):
        steps.set_epoch(step // len(steps))
        losses.append(torch_step(trained, segments_of(steps[step % len(steps)])))
        norms.append(torch.nn.utils.clip_grad_norm_(weights, 1.0).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    found = [line for line in log if "loss" in line]
    assert [line["loss"] for line in found] == pytest.approx(losses, abs=1e-4)
    assert found[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert losses[-1] < losses[0] - 0.5  # it learns, so that the optimizer is in the comparison


def test_a_resumed_run_has_the_same_trace(pair, tmp_path):
    """With dropout: optimizer, schedule, random state and order all come from the checkpoint."""
    _, reference, base, _ = pair
    lora, rows = LoraConfig(r=4, alpha=8, dropout=0.1), samples(reference.config.vocab_size)
    whole, first, second = [], [], []
    trainer_of(loaded(base, lora=lora), rows, tmp_path / "a", 8, whole).train()
    stopped = trainer_of(loaded(base, lora=lora), rows, tmp_path / "b", 8, first)
    stopped.state.max_steps = 3
    stopped.train()
    resumed = trainer_of(loaded(base, lora=lora), rows, tmp_path / "b", 8, second)
    resumed.train(str(tmp_path / "b/checkpoint-3"))
    assert [line["loss"] for line in first + second] == [line["loss"] for line in whole]


@pytest.mark.parametrize(("quantization", "bits"), [("nf4", 4), ("int8", 8)])
def test_a_quantised_base_trains(pair, tmp_path, quantization, bits):
    _, reference, base, _ = pair
    if reference.config.hidden_size % 64:
        with pytest.raises(FastFTError, match=r"groups of 64.*quantization: none"):
            loaded(base, quantization=quantization)
        return
    model, log = loaded(base, quantization=quantization, dtype="bfloat16"), []
    linears = [m.linear for _, m in model.model.named_modules() if isinstance(m, LoraLinear)]
    assert {linear.bits for linear in linears} == {bits}
    trainer_of(model, samples(reference.config.vocab_size), tmp_path, 18, log).train()
    losses = [line["loss"] for line in log]
    assert sum(losses[-6:]) < sum(losses[:6]) - 1


def test_the_adapter_config_is_pefts(pair, tmp_path):
    model, *_ = pair
    model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    linear = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert sorted(config["target_modules"]) == sorted(linear.split())


def test_what_the_engine_does_not_do_is_refused(pair, tmp_path):
    _, _, base, adapter = pair
    with pytest.raises(FastFTError, match=r"use_dora.*engine: stock"):
        loaded(base, lora=LoraConfig(use_dora=True))
    with pytest.raises(FastFTError, match=r"no 'q_prj' \(did you mean 'q_proj'"):
        loaded(base, lora=LoraConfig(target_modules=["q_prj"]))
    with pytest.raises(FastFTError, match="does not fit"):
        loaded(base, adapter, lora=LoraConfig(r=8, alpha=8))
