"""A mixture of three sources with weights, killed and resumed: the same order, the same losses."""

import json
import signal

import pytest
import yaml

from tests.e2e.conftest import fastft, losses
from tests.e2e.test_resume import start, wait_for_step


@pytest.mark.long
def test_a_killed_mixture_goes_on_as_if_nothing_had_happened(tmp_path, checkpoint_of):
    sources = []
    for name, rows, weight in (("a", 60, 5), ("b", 20, 3), ("c", 40, 2)):
        path = tmp_path / f"{name}.jsonl"
        lines = [
            {"prompt": f"{name} asks {i}?", "completion": f"{name} says {i * i}."}
            for i in range(rows)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources.append({"source": str(path), "weight": weight})
    values = {
        "project": "t",
        "model": {"name": str(checkpoint_of("qwen3")), "max_seq_length": 128, "engine": "stock", "dtype": "float32"},
        "data": {"sources": sources, "eval_fraction": 0.1},
        "lora": {"dropout": 0.1},
        "train": {"max_steps": 20, "save_steps": 4, "eval_steps": 10, "learning_rate": 3e-3},
    }  # fmt: skip
    traces = {}
    for name in ("whole", "killed"):
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / name)}))
        run = tmp_path / name / "t"
        if name == "killed":
            process = start(config)
            wait_for_step(run, 6, process)
            process.send_signal(signal.SIGKILL)
            process.wait()
        outcome = fastft("train", config, "--json")
        assert outcome.code == 0, outcome.err
        traces[name] = losses(run)
    assert sorted(traces["whole"]) == list(range(1, 21))
    assert traces["killed"] == traces["whole"]
    # Other weights are other data: the run is not continued.
    sources[0]["weight"] = 1
    config.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "killed")}))
    outcome = fastft("train", config, "--json")
    assert outcome.code == 2
    assert "data.sources" in outcome.err
