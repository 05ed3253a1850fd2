"""A whole run on a GPU: it learns, in float16 as well, and goes on after a stop where it was."""

import json

import pytest

from tests.e2e.conftest import fastft, losses, run_python

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("engine", ["unsloth", "stock"])
@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_a_run_learns_and_resumes(engine, dtype, checkpoint_of, write_config, tmp_path):
    model = {"engine": engine, "dtype": dtype}
    config = write_config(
        checkpoint_of("llama"),
        model=model,
        train={"max_steps": 40, "save_steps": 20, "eval_steps": 20},
    )
    first = fastft("train", config, "--stop-after", "20")
    assert first.code == 0, first.err[-3000:]
    second = fastft("train", config)
    assert second.code == 0, second.err[-3000:]
    run = tmp_path / "runs" / "t"
    record, trace = json.loads((run / "run.json").read_text()), losses(run)
    assert sorted(trace) == list(range(1, 41))
    assert record["eval_loss_after"] < record["eval_loss_before"]
    assert (run / "checkpoints").is_dir()
    if dtype == "float16":
        assert list(
            run.glob("checkpoints/*/scaler.pt")
        )  # without it a resumed run would scale its loss anew


SFT = """
import json, sys
from fastft import FastLanguageModel, FastSFTTrainer
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

dataset = Dataset.from_list([{"text": f"Count to {i % 11}: " + " ".join(map(str, range(i % 11 + 1)))} for i in range(48)])

def run(trainer_class):
    model, tokenizer = FastLanguageModel.from_pretrained(sys.argv[1], max_seq_length=128, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16, random_state=1, use_gradient_checkpointing="unsloth")
    trainer = trainer_class(model=model, tokenizer=tokenizer, train_dataset=dataset, args=SFTConfig(per_device_train_batch_size=2,
        gradient_accumulation_steps=2, max_steps=8, learning_rate=5e-3, logging_steps=1, seed=3, output_dir=sys.argv[2],
        report_to="none", save_strategy="no", max_length=64, padding_free=False))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer

theirs, _ = run(SFTTrainer)
ours, trainer = run(FastSFTTrainer)
print(json.dumps({"theirs": theirs, "ours": ours, "rows": trainer._stepper.policy.rows}))
"""


def test_the_sft_trainer_gives_trls_losses(checkpoint_of, tmp_path):
    found = run_python(SFT, checkpoint_of("llama"), tmp_path)
    assert len(found["ours"]) == 8
    assert found["rows"] == "packed"
    assert found["ours"] == pytest.approx(found["theirs"], rel=0.02)
