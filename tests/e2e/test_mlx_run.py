"""`fastft train` on the MLX engine as a user runs it; skipped where mlx is not installed."""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import fastft, losses, run_python, start, wait_for_step

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


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_trace(checkpoint_of, write_config, tmp_path):
    """kill -9 in the middle; with dropout, so that the random state is in the comparison."""
    base, settings = checkpoint_of("llama"), {"max_steps": 24, "save_steps": 4, "eval_steps": 12}
    config = write_config(base, project="whole", model={"engine": "mlx"}, train=settings)
    assert fastft("train", config, "--json").code == 0
    config = write_config(base, project="killed", model={"engine": "mlx"}, train=settings)
    killed = Path(tmp_path / "runs/killed")
    process = start(config)
    wait_for_step(killed, 7, process)
    process.kill()
    process.wait()
    assert not (killed / "final").exists()
    done = fastft("train", config, "--json")
    assert done.code == 0, done.err
    assert "resuming after step" in done.err
    assert losses(killed) == losses(tmp_path / "runs/whole")
    assert len(losses(killed)) == 24
