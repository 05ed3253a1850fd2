"""`fastft train` compares the plan with its first steps, and stops before a batch that cannot fit."""

import json
import random

from tests.e2e.conftest import fastft

LONG = 2**18  # tokens; gemma2's written-out scores of that many pairs take terabytes


def write_rows(path, long_one):
    """32 short rows; with `long_one`, the 20th is as long as a book."""
    random.seed(0)
    rows = [" ".join(f"w{random.randrange(1000)}" for _ in range(6)) for _ in range(32)]
    if long_one:
        rows[20] = "x " * LONG
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows), encoding="utf-8")
    return path


def run_of(tmp_path):
    folder = tmp_path / "runs" / "t"
    return folder, json.loads((folder / "run.json").read_text())


def test_predicted_and_measured_are_said_and_kept(checkpoint_of, write_config, tmp_path):
    config = write_config(checkpoint_of("llama"), train={"max_steps": 3}, data={"eval_fraction": 0})
    done = fastft("train", config)
    assert done.code == 0, done.err
    assert "planned" in done.err
    _, record = run_of(tmp_path)
    memory = record["memory"]
    assert memory["fits"]
    # A whole process with torch in it, and no more than this tiny model can need.
    assert 0.3e9 < memory["measured_bytes"] < 3e9
    assert memory["predicted_bytes"] > 0
    assert memory["tokens"] <= memory["largest_tokens"] <= 8 * 128
    assert memory["largest_bytes"] <= memory["limit_bytes"]


def test_a_run_whose_longest_row_cannot_fit_is_stopped_with_its_state(
    checkpoint_of, write_config, tmp_path
):
    data = {
        "source": str(write_rows(tmp_path / "x.jsonl", long_one=True)),
        "eval_fraction": 0,
        "long_text": "truncate",
    }
    config = write_config(
        checkpoint_of("gemma2"),
        data=data,
        model={"max_seq_length": LONG},
        train={"max_steps": 16, "effective_batch_size": 2, "seed": 1},
    )
    done = fastft("train", config, "--json")
    assert done.code == 3, done.err
    assert "stopped after step 2 of 16" in done.err
    assert "model.max_seq_length of at most" in done.err
    assert "Traceback" not in done.err
    folder, record = run_of(tmp_path)
    assert record["status"] == "paused"
    assert not record["memory"]["fits"]
    assert record["memory"]["largest_bytes"] > record["memory"]["limit_bytes"]
    assert (folder / "checkpoints" / "checkpoint-2" / "manifest.json").is_file()
    # What it advises does run: the same data below that length.
    fitting = min(record["memory"]["largest_fitting_tokens"], 512)
    assert fitting > 100
    again = fastft(
        "train", config, "--set", f"model.max_seq_length={fitting}", "--set", "project=shorter"
    )
    assert again.code == 0, again.err
