"""A base that ships a chat template whose tokens it never saw: as Qwen2.5 base, made of the quickstart's."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from fastft.data.named_templates import NAMED
from fastft.quickstart import base_path, write_task
from tests.e2e.conftest import fastft


@pytest.fixture
def base(tmp_path):
    """The quickstart base with ChatML as its own template, both rows those of an unused token."""
    folder = tmp_path / "base"
    shutil.copytree(base_path(), folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text()) | {"chat_template": NAMED["chatml"]}
    path.write_text(json.dumps(saved))
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    weights = load_file(folder / "model.safetensors")
    (embedding,) = (t for n, t in weights.items() if n.endswith("embed_tokens.weight"))
    for name in ("<|im_start|>", "<|im_end|>"):
        embedding[ids[name]] = embedding[ids["<|pad|>"]]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.long
def test_tokens_that_the_base_never_learnt_are_trained_and_answers_end(base, tmp_path):
    write_task(tmp_path / "data")
    config = {
        "project": "own",
        "output_dir": str(tmp_path / "runs"),
        "model": {
            "name": str(base),
            "quantization": "none",
            "max_seq_length": 128,
            "engine": "stock",
        },
        "data": {"source": str(tmp_path / "data" / "train.jsonl"), "eval_fraction": 0.05},
        "lora": {"r": 16, "alpha": 16},
        "train": {
            "effective_batch_size": 16,
            "max_steps": 120,
            "learning_rate": 0.003,
            "eval_steps": 120,
        },
    }
    (tmp_path / "own.yaml").write_text(json.dumps(config))
    done = fastft("train", tmp_path / "own.yaml")
    assert "the base never learnt <|im_start|>, <|im_end|>" in done.err
    log = (tmp_path / "runs" / "own" / "log.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, log) if "eval_loss" in line][-1]
    assert last["eval_loss"] < 0.5  # 3.49 where only LoRA is trained
