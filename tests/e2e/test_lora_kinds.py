"""Whatever starts or shapes the adapter: final/ on the plain base, in plain peft, is the model that was evaluated."""

import json
from types import SimpleNamespace

import pytest
import torch

from fastft import cli
from fastft.data.batches import micro_batches, segments_of, supervised_tokens
from tests.families import NEWEST

KINDS = {
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "rslora": {"use_rslora": True, "alpha": 4},
    "dora": {"use_dora": True},
    "names": {"target_modules": ["q_proj", "down_proj"], "r": 4},
    "tokens": {"train_tokens": ["<|im_start|>", "<|im_end|>"]},
}


def loss_in_plain_peft(base, run):
    """Mean loss per supervised token of the run's held-out samples, padded, on plain transformers + peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run / "final"
    ).eval()
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    segments = segments_of(
        [SimpleNamespace(**row, segments=[len(row["input_ids"])]) for row in rows]
    )
    (batch,) = micro_batches(segments, 10**6, rows="padded", pad_token_id=0, device="cpu")
    with torch.no_grad():
        return model(**batch.inputs, num_items_in_batch=supervised_tokens(segments)).loss.item()


@pytest.mark.parametrize("kind", KINDS)
def test_final_is_what_was_evaluated_also_after_a_stop(kind, write_config, checkpoint_of, tmp_path):
    base = checkpoint_of("qwen3")
    lora = {"dropout": 0.0, "r": 8, **KINDS[kind]}
    config = write_config(
        base,
        lora=lora,
        train={"max_steps": 6, "save_steps": 2, "eval_steps": 6, "learning_rate": 1e-3},
    )
    assert cli.run(["train", str(config), "--stop-after", "3"]) == 0
    assert cli.run(["train", str(config)]) == 0
    run = tmp_path / "runs" / "t"
    record = json.loads((run / "run.json").read_text())
    assert record["eval_loss_after"] < record["eval_loss_before"]
    assert loss_in_plain_peft(base, run) == pytest.approx(record["eval_loss_after"], abs=2e-5)


@pytest.mark.parametrize("family", NEWEST)
def test_the_newest_families_load_train_and_merge(family, write_config, checkpoint_of, tmp_path):
    base = checkpoint_of(family)
    config = write_config(
        base, lora={"dropout": 0.0}, train={"max_steps": 4, "save_steps": 4, "eval_steps": 4}
    )
    assert cli.run(["train", str(config)]) == 0
    run = tmp_path / "runs" / "t"
    record = json.loads((run / "run.json").read_text())
    assert record["eval_loss_after"] < record["eval_loss_before"]
    assert cli.run(["export", str(run), "--to", "merged", "--dtype", "float32", "--no-verify"]) == 0
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(
        run / "export" / "merged", dtype=torch.float32
    ).eval()
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        assert torch.isfinite(merged(ids).logits).all()
