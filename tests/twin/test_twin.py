"""fastft's CUDA branch, and Unsloth's, on a CPU: runs on a pretend T4 with everything that happens to runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import losses
from tests.families import SENTENCES, make_checkpoint

ROOT = Path(__file__).parents[2]


def a_run(folder, base, sizes, train, **model):
    """Write a config of three steps on plain texts of so many characters (no answers are sampled
    then).
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    texts = [f"{i} {' '.join(SENTENCES[i % 9].split())[:size]}" for i, size in enumerate(sizes)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "project": "t",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(base), "max_seq_length": 64, **model},
        "data": {"source": str(rows), "eval_fraction": 0.2, "long_text": "truncate"},
        "lora": {"dropout": 0.0, "r": 4},
        "train": {
            "max_steps": 3, "save_steps": 2, "eval_steps": 2, "effective_batch_size": 4,
            "learning_rate": 3e-3, "prefetch": True, **train,
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


def test_a_run_on_a_pretend_t4(tmp_path):
    """The least that goes through everything: one layer, few tokens; two steps end out of memory."""
    base = make_checkpoint("llama", tmp_path / "llama", num_hidden_layers=1)
    train = {"effective_batch_size": 3, "eval_steps": 3}
    config = a_run(tmp_path / "twin", base, range(12, 22), train)
    found = python("-m", "tests.twin.run", "t4", config, folder=tmp_path)
    went_well(found)
    assert sorted(losses(tmp_path / "twin" / "runs" / "t")) == [1, 2, 3]
    # The third step's rows were made while the second computed; the second's, before it ran out of
    # memory, were cut anew.
    assert found["made_ready"] == [False, False, True]


def went_well(found):
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


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["auto", "long"])
def test_a_run_that_is_resumed_learns_what_plain_transformers_does(checkpointing, tmp_path):
    base = make_checkpoint("llama", tmp_path / "llama")
    # Where it is asked for, rows of more than 64 tokens are recomputed, after each accident those of
    # more than half as many.
    train = {"gradient_checkpointing": checkpointing}
    train |= {"micro_batch_tokens": 64} if checkpointing == "long" else {}
    sizes = range(20, 74, 3)
    config = a_run(tmp_path / "twin", base, sizes, train)
    found = python("-m", "tests.twin.run", "t4", config, 2, folder=tmp_path)
    went_well(found)
    assert found["choices"]["gradient_checkpointing"] == (checkpointing == "long" and "long")
    # Both kinds of rows came, and those that keep their activations switched every layer.
    layers = sorted(set(found["kept"]))
    assert layers == ([0] if checkpointing == "auto" else [0, layers[-1]])
    assert checkpointing == "auto" or layers[-1] >= 2
    # What the step took, not what loading and checking took: a tiny model's plan is a tiny number.
    assert found["memory"]["measured_bytes"] < 4 * found["memory"]["predicted_bytes"]
    # The losses are those of plain transformers in float32, through the accidents and the resume.
    plain = a_run(tmp_path / "plain", base, sizes, {}, engine="stock", dtype="float32")
    python("-c", PLAIN, plain, folder=tmp_path)
    trace, expected = (losses(tmp_path / name / "runs" / "t") for name in ("twin", "plain"))
    assert sorted(trace) == sorted(expected) == [1, 2, 3]
    for at, loss in expected.items():
        assert trace[at] == pytest.approx(loss, rel=0.01)
