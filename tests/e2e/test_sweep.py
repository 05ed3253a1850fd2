"""A trial of a sweep is the run that it would be alone, through kills, processes and machines."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastft.config import load_config
from fastft.progress import silent
from fastft.training.sweep import sweep
from fastft.training.train import train
from tests.e2e.conftest import fastft, losses

VARY = ["lora.r=4,8", "train.learning_rate=1e-3,5e-3"]


def command(config, *arguments):
    vary = [part for axis in VARY for part in ("--vary", axis)]
    return ["sweep", str(config), *vary, *map(str, arguments)]


@pytest.fixture
def config(write_config, checkpoint_of):
    """Twelve steps, of which every third is judged: rungs at 3 and 6.

    The token budget is given: auto goes by the RAM that is free at each start, and rows that are
    cut otherwise are summed in another order.
    """
    train = {"eval_steps": 3, "save_steps": 5, "micro_batch_tokens": 512}
    return write_config(checkpoint_of("llama"), train=train)


def assert_the_same(trial, alone):
    """Bit for bit: every loss, and every number of the adapter."""
    assert losses(trial) == losses(alone)
    files = [run / "final" / "adapter_model.safetensors" for run in (trial, alone)]
    ours, theirs = (load_file(path) for path in files)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def alone(config, tmp_path, settings, *more):
    """The run that a trial would be by itself, in a process of its own."""
    varied = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    name = "-".join(settings.values())
    done = fastft("train", config, *varied, "--set", f"project={name}", *more)
    assert done.code == 0, done.err
    return tmp_path / "runs" / name


def test_trials_are_dropped_and_the_best_is_what_it_would_be_alone(config, tmp_path):
    found = sweep(config, vary=VARY, reporter=silent())
    assert found.rungs == [3, 6]
    assert sorted(trial.status for trial in found.trials) == ["done", "dropped", "dropped", "dropped"]  # fmt: skip
    steps = sorted(max(losses(trial.run.path)) for trial in found.trials)
    assert steps == [3, 3, 6, 12]
    assert found.best is not None
    assert found.best.status == "done"
    varied = [f"{key}={value}" for key, value in found.best.settings.items()]
    made = load_config(config, [*varied, "project=alone"])
    train(made, reporter=silent())
    assert_the_same(found.best.run.path, tmp_path / "runs" / "alone")
    written = json.loads((found.folder / "sweep.json").read_text())
    assert written["best"] == str(found.best.run.path)
    assert (found.folder / "sweep.png").is_file()
    again = sweep(config, vary=VARY, reporter=silent())  # nothing is trained a second time
    assert [t.status for t in again.trials] == [t.status for t in found.trials]
    assert again.best is not None
    assert again.best.settings == found.best.settings


@pytest.mark.long
@pytest.mark.parametrize("engine", ["stock", "unsloth"])
def test_every_trial_equals_its_run_alone(engine, config, tmp_path):
    change = ["--set", f"model.engine={engine}"]
    done = fastft(*command(config, "--keep", "all", "--json", *change))
    assert done.code == 0, done.err
    assert [trial["status"] for trial in done.json["trials"]] == ["done"] * 4
    for trial in done.json["trials"]:
        assert_the_same(Path(trial["run"]), alone(config, tmp_path, trial["settings"], *change))


@pytest.mark.long
def test_killed_and_started_again(config, tmp_path):
    """kill -9 at four random moments; the last call finishes with what an undisturbed sweep has."""
    undisturbed = fastft(*command(config, "--json", "--set", "project=u"))
    draw = random.Random(2)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "fastft", *command(config)], stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(6, 25))
        process.kill()
        process.wait()
    last = fastft(*command(config, "--json"))
    assert last.code == 0, last.err
    shown = [(t["settings"], t["eval_loss"], t["status"]) for t in last.json["trials"]]
    assert shown == [(t["settings"], t["eval_loss"], t["status"]) for t in undisturbed.json["trials"]]  # fmt: skip
    best = [Path(outcome.json["best"]) for outcome in (last, undisturbed)]
    assert_the_same(*best)


@pytest.mark.long
def test_spread_over_two_processes(config, tmp_path):
    one = fastft(*command(config, "--json", "--set", "project=u"))
    two = fastft(*command(config, "--json", "--processes", 2))
    assert two.code == 0, two.err
    for ours, theirs in zip(two.json["trials"], one.json["trials"], strict=True):
        assert (ours["settings"], ours["status"]) == (theirs["settings"], theirs["status"])
        assert losses(ours["run"]) == losses(theirs["run"])
    assert_the_same(Path(two.json["best"]), Path(one.json["best"]))


RAY = """
import json, os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
os.environ["RAY_ADDRESS"] = cluster.address
import fastft
found = fastft.sweep(sys.argv[1], vary=json.loads(sys.argv[2]), on_ray=True)
nodes = set()
for path in (found.folder / "ray").rglob("result.json"):
    nodes |= {json.loads(line)["node"] for line in path.read_text().splitlines()}
print(json.dumps(found.as_dict() | {"nodes": len(nodes)}))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.long
def test_ray_with_two_workers(config):
    pytest.importorskip("ray")
    one = fastft(*command(config, "--json", "--set", "project=u"))
    done = subprocess.run(
        [sys.executable, "-c", RAY, str(config), json.dumps(VARY)],
        capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["nodes"] == 2
    for ours, theirs in zip(found["trials"], one.json["trials"], strict=True):
        assert (ours["settings"], ours["status"]) == (theirs["settings"], theirs["status"])
    assert_the_same(Path(found["best"]), Path(one.json["best"]))
