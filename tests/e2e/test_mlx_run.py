"""`fastft train` on the MLX engine as a user runs it; skipped where mlx is not installed."""

import json

import pytest

from tests.e2e.conftest import fastft, losses, run_python

pytest.importorskip("mlx_lm")

LOAD = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
moved = max(p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n)
print(json.dumps({"moved": moved}))
"""


def test_a_stopped_run_goes_on_to_the_same_trace_and_a_peft_adapter(checkpoint_of, write_config):
    base, runs = checkpoint_of("qwen3"), {}
    for name, slices in (("whole", [[]]), ("sliced", [["--stop-after", "2"], []])):
        settings = {"max_steps": 5, "save_steps": 2, "eval_steps": 5}
        config = write_config(base, project=name, model={"engine": "mlx"}, train=settings)
        for more in slices:
            done = fastft("train", config, "--json", *more)
            assert done.code == 0, done.err
        runs[name] = done.json["run"]
    assert losses(runs["sliced"]) == losses(runs["whole"])
    assert len(losses(runs["whole"])) == 5
    with open(f"{runs['whole']}/run.json", encoding="utf-8") as file:
        record = json.load(file)
    assert record["choices"]["engine"]["value"] == "mlx"
    assert record["choices"]["padding_free"]["value"] is True
    assert record["status"] == "done"
    assert run_python(LOAD, base, f"{runs['whole']}/final")["moved"] > 0
