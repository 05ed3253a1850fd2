"""fastft's CUDA branch, and Unsloth's, on a CPU: one run on a pretend T4 with everything that happens to runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import losses
from tests.families import SENTENCES, make_checkpoint

ROOT = Path(__file__).parents[2]


def a_run(folder, base, **model):
    """Write a config of three steps on short plain texts (no answers are sampled then)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    texts = [" ".join(f"{number}".split()) for number in SENTENCES[:9] * 2]
    rows.write_text(
        "".join(
            json.dumps({"text": f"{i} {text[: 20 + 3 * i]}"}, ensure_ascii=False) + "\n"
            for i, text in enumerate(texts)
        ),
        encoding="utf-8",
    )
    values = {
        "project": "t",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(base), "max_seq_length": 64, **model},
        "data": {"source": str(rows), "eval_fraction": 0.2, "long_text": "truncate"},
        "lora": {"dropout": 0.0, "r": 4},
        "train": {
            "max_steps": 3, "save_steps": 2, "eval_steps": 2, "effective_batch_size": 4,
            "learning_rate": 3e-3,
        },
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def python(*arguments, folder, **env):
    """Run a process of its own in the repository; its last line is JSON."""
    import os

    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=500, cwd=ROOT,
        env={**os.environ, "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled"), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


PLAIN = """
import json, sys
from fastft.config import load_config
from fastft.progress import Reporter
from fastft.training.train import train
print(json.dumps(train(load_config(sys.argv[1]), reporter=Reporter(quiet=True)).run))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.long
def test_a_run_on_a_t4(base, tmp_path):
    found = python("-m", "tests.twin.run", "t4", a_run(tmp_path / "twin", base), folder=tmp_path)
    assert found["status"] == "done"
    choices = found["choices"]
    assert (choices["engine"], choices["dtype"]) == ("unsloth", "float16")
    assert choices["padding_free"] is True, found["why"]
    assert found["kernels"]["_rms_layernorm_backward"] > 0  # Unsloth's own code ran
    # No CPU tensor was handed to the card, and one card is used.
    assert found["mixed"] == []
    assert set(found["cards"]) == {1}
    # Out of memory in a step and in an evaluation: smaller rows, the run goes on.
    assert sorted(found["happened"]) == ["evaluation", "step"]
    # The model is gone from the card once `train` has returned. What is left are the lengths of the
    # last sequences in two caches of unsloth.utils.packing, one entry a card.
    assert max(found["left"]) < 200
    assert found["emptied"] > 0
    # What the step took, not what loading and checking took: a tiny model's plan is a tiny number.
    assert found["memory"]["measured_bytes"] < 4 * found["memory"]["predicted_bytes"]
    # The losses are those of plain transformers in float32, through the accidents and the resume.
    plain = a_run(tmp_path / "plain", base, engine="stock", dtype="float32")
    python("-c", PLAIN, plain, folder=tmp_path)
    trace, expected = (losses(tmp_path / name / "runs" / "t") for name in ("twin", "plain"))
    assert sorted(trace) == sorted(expected) == [1, 2, 3]
    for at, loss in expected.items():
        assert trace[at] == pytest.approx(loss, rel=0.01)
