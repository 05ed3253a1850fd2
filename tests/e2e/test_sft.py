"""FastSFTTrainer against trl's own SFTTrainer under real Unsloth on the CPU, and what it refuses."""

import json

import pytest

from tests.e2e.conftest import run_python

NOTEBOOK = """
import sys, json
from fastft import FastLanguageModel
from fastft import FastSFTTrainer
from fastft.training.sft import _segments
import torch
from datasets import Dataset
from trl import SFTTrainer, SFTConfig

what = json.loads(sys.argv[3])
rows = []
for i in range(24):
    answer = " ".join(str(j) for j in range(i % 11 + 1))
    rows.append({"prompt": f"Count to {i % 11}.", "completion": f" {answer}."} if what["completion"] else {"text": f"Count to {i % 11}: {answer}."})
dataset = Dataset.from_list(rows)

def losses(cls, **more):
    model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=128, dtype=torch.float32, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, lora_dropout=0, bias="none", random_state=1,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=what["checkpointing"])
    trainer = cls(model=model, tokenizer=tokenizer, train_dataset=dataset, eval_dataset=dataset.select(range(4)),
        args=SFTConfig(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, learning_rate=5e-3, logging_steps=1,
            bf16=False, seed=3, output_dir=sys.argv[2], report_to="none", save_strategy="no", max_length=64,
            gradient_checkpointing=bool(what["checkpointing"])), **more)
    if cls is not SFTTrainer:  # what decides about rows on a GPU
        segments = [segment for batch in trainer.get_train_dataloader() for segment in _segments(batch)]
        found = trainer._check_rows(segments, "varlen")
        assert found.exact and found.leak > 0.01, found.reason
    if what["responses"]:
        from unsloth.chat_templates import train_on_responses_only
        trainer = train_on_responses_only(trainer, instruction_part="Count to", response_part=": ")
    trainer.train()
    log = trainer.state.log_history
    return ([e["loss"] for e in log if "loss" in e], [e["grad_norm"] for e in log if "grad_norm" in e],
            trainer.evaluate()["eval_loss"], trainer)

reference, norms, evaluated, _ = losses(SFTTrainer)
fast, fast_norms, fast_evaluated, trainer = losses(FastSFTTrainer, micro_batch_tokens=48)
print(json.dumps({"reference": reference, "fast": fast, "norms": norms, "fast_norms": fast_norms, "evaluated": [evaluated, fast_evaluated],
    "layers": len(trainer._stepper.fused.forwards), "rows": trainer._stepper.policy.rows, "engine": trainer._stepper.engine.name}))
"""


def compare(base, folder, **what):
    result = run_python(
        NOTEBOOK,
        base,
        folder,
        json.dumps({"completion": False, "responses": False, "checkpointing": False, **what}),
    )
    assert result["engine"] == "unsloth"
    assert result["layers"] > 4
    assert result["rows"] == "trie", "the rows of a step share their beginnings"
    assert len(result["fast"]) == 6
    assert result["reference"][-1] < result["reference"][0] - 0.1
    for reference, fast in zip(result["reference"], result["fast"], strict=True):
        assert abs(reference - fast) < 1e-4
    for reference, fast in zip(result["norms"], result["fast_norms"], strict=True):
        assert abs(reference - fast) < 1e-3 * reference
    assert abs(result["evaluated"][0] - result["evaluated"][1]) < 1e-4


def test_full_text_gives_the_losses_of_trl(checkpoint_of, tmp_path):
    compare(checkpoint_of("llama"), tmp_path)


@pytest.mark.long
def test_completions_with_checkpointing_give_the_losses_of_trl(checkpoint_of, tmp_path):
    compare(checkpoint_of("qwen3"), tmp_path, completion=True, checkpointing="unsloth")


REFUSED = """
import sys, json
from fastft import FastFTError, FastLanguageModel, FastSFTTrainer
from datasets import Dataset
from trl import SFTConfig
model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=64)
model = FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear", lora_alpha=4)
said = []
def attempt(collator=None, settings={}, **more):
    try:
        trainer = FastSFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list([{"text": "a b c d"}] * 4),
            args=SFTConfig(output_dir=sys.argv[2], report_to="none", max_steps=1, save_strategy="no", bf16=False, use_cpu=True, **settings), data_collator=collator, **more)
        trainer.train()
        said.append("trained")
    except FastFTError as error:
        said.append(str(error))
attempt()
attempt(settings={"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0})
attempt(compute_loss_func=lambda *a, **k: 0)
attempt(tokenizer=tokenizer)
import torch
from types import SimpleNamespace
from fastft.training.sft import keep_batches_padded
for asked in (None, True):
    settings = SimpleNamespace(padding_free=asked)
    keep_batches_padded(settings)
    said.append(settings.padding_free)
attempt(collator=lambda rows: {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.ones(2, 4, dtype=torch.long), "weights": torch.ones(2)})
print(json.dumps(said))
"""


def test_what_it_would_ignore_is_refused(checkpoint_of, tmp_path):
    plain, settings, loss, twice, left_open, asked_for, collator = run_python(
        REFUSED, checkpoint_of("llama"), tmp_path
    )
    assert plain == "trained"
    assert "label_smoothing_factor" in settings
    assert "neftune_noise_alpha" in settings
    assert "compute_loss_func" in loss
    assert "two names of one argument" in twice
    assert (left_open, asked_for) == (
        False,
        True,
    )  # Unsloth turns it on where it is None; True is refused
    assert "weights" in collator
