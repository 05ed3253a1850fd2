"""The kill test: SIGKILL at random moments, start again, and in the end nobody can tell.

    python tests/kill_test.py --kills 50 [--seed N] [--folder DIR]

A tiny model trains in float32 with a mirror, evaluations and a merged export. Real processes are killed during steps,
checkpoint writes, mirror copies and the export; now and then the local disk is emptied too, as when a notebook session
is lost. After every kill, whatever is named like a checkpoint, an adapter or an export must be whole; every restart must
succeed; and each finished run must have the loss trace, the adapter and the merged weights of the undisturbed one, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from fastft.models import read_header
from fastft.runs import checkpoint
from tests.families import make_checkpoint

STEPS = 24
MOMENTS = ("step", "checkpoint", "mirror", "export")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory() as folder:
        print(
            json.dumps(survive(arguments.folder or Path(folder), arguments.kills, seed), indent=1)
        )


def survive(folder, kills, seed, say=print):
    """Kill `kills` times and finish; raises AssertionError where anything differs. Returns what was done."""
    say(f"seed {seed}")
    chance, began = random.Random(seed), time.monotonic()
    config = prepare(folder)
    reference = folder / "reference"
    finish(start(config, reference, mirror=False))
    expected = outcome(reference / "t")
    done, moments, runs = 0, [], 0
    counts = Counter()
    while done < kills:
        runs += 1
        work = folder / f"run-{runs}"
        while True:
            if not moments:
                moments = [*MOMENTS]
                chance.shuffle(moments)
            moment = moments.pop() if done < kills else None
            killed = one_process(config, work, moment, chance)
            check_nothing_partial(work, expected)
            if not killed:
                break
            done += 1
            counts[moment] += 1
            at = steps_of(work / "runs" / "t")
            wiped = chance.random() < 0.2
            if wiped:
                shutil.rmtree(work / "runs")
            counts["local disk emptied"] += wiped
            say(
                f"{done}: killed during {moment}, after step {at}{', local disk emptied' if wiped else ''}"
            )
        assert outcome(work / "runs" / "t") == expected, (
            f"run {runs} differs from the undisturbed one"
        )
        say(
            f"run {runs} finished: loss trace, adapter and merged weights equal the undisturbed run's"
        )
        shutil.rmtree(work)
    return {
        "seed": seed,
        "kills": done,
        "runs": runs,
        "seconds": round(time.monotonic() - began),
    } | dict(counts)


def prepare(folder):
    """Write the base model, the data and the config; returns the config's values."""
    folder.mkdir(parents=True, exist_ok=True)
    make_checkpoint("llama", folder / "base")
    numbers = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as out:
        for i in range(80):
            question = (
                "What is "
                + " ".join(str(numbers.randint(0, 99)) for _ in range(numbers.randint(1, 12)))
                + "?"
            )
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"The answer is {i}."},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")
    return {
        "project": "t",
        "model": {
            "name": str(folder / "base"),
            "max_seq_length": 64,
            "engine": "stock",
            "dtype": "float32",
        },
        "data": {"source": str(folder / "rows.jsonl")},
        "lora": {
            "dropout": 0.1,
            "r": 64,
        },  # a larger rank: checkpoints take longer to write and to copy
        "train": {"max_steps": STEPS, "save_steps": 2, "eval_steps": 8, "learning_rate": 3e-3},
        "export": {"to": ["adapter", "merged"]},
    }


def start(config, work, mirror=True):
    work.mkdir(parents=True, exist_ok=True)
    runs = work / "runs" if mirror else work
    (work / "drive").mkdir(exist_ok=True)
    values = config | {
        "output_dir": str(runs),
        "mirror": str(work / "drive" / "fastft") if mirror else None,
    }
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with (work / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "fastft", "train", str(path)],
            stdout=output,
            stderr=output,
            cwd=work,
            env=os.environ
            | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        )


def finish(process):
    process.wait(600)
    assert process.returncode == 0, f"a run that nobody disturbed ended with {process.returncode}"


def one_process(config, work, moment, chance):
    """Start (again) and kill at `moment`; returns whether it was killed (False: it finished first)."""
    run, drive = work / "runs" / "t", work / "drive" / "fastft" / "t"
    first = steps_of(run)
    at, skip, wait = first + chance.randint(1, 7), chance.randint(0, 3), chance.random() * 0.02
    process = start(config, work)
    seen = 0
    watched = {
        "checkpoint": run / "checkpoints",
        "mirror": drive / "checkpoints",
        "export": run / "export",
    }.get(moment)
    was_there = False
    while process.poll() is None:
        if moment == "step":
            reached = steps_of(run) >= at
        elif watched is not None:
            there = is_being_written(watched) or (moment == "export" and is_being_written(run))
            seen += there and not was_there
            was_there = there
            reached = there and seen > (skip if moment != "export" else skip % 2)
        else:
            reached = False
        if reached:
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    process.wait()
    if process.returncode == -signal.SIGKILL:
        return True
    assert process.returncode == 0, (
        f"the restart failed:\n{(work / 'output.txt').read_text()[-3000:]}"
    )
    return False


def is_being_written(folder):
    try:
        names = os.listdir(folder)
        return any(".writing-" in name or ".partial" in name for name in names)
    except FileNotFoundError:
        return False


def steps_of(run):
    try:
        return (run / "log.jsonl").read_text().count('"loss"')
    except FileNotFoundError:
        return 0


def check_nothing_partial(work, expected):
    """Whatever has the name of something whole must be whole."""
    for root in (work / "runs" / "t", work / "drive" / "fastft" / "t"):
        for _, path in checkpoint.checkpoints(root / "checkpoints"):
            problem = checkpoint.what_is_wrong(path)
            assert problem is None, f"{path} was taken for whole: {problem}"
        if (root / "final").exists():
            assert digest(root / "final" / "adapter_model.safetensors") == expected["adapter"], root
            assert checkpoint.what_is_wrong(root / "final", ("adapter_model.safetensors",)) is None
        merged = root / "export" / "merged"
        if merged.exists():
            assert {"config.json", "tokenizer.json"} <= {
                p.name for p in merged.iterdir()
            } or root.parent.name == "fastft"
            for path in merged.glob("*.safetensors"):
                read_header(path)
                assert digest(path) == expected["merged"][path.name]


def outcome(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "losses": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "eval_losses": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
        "adapter": digest(run / "final" / "adapter_model.safetensors"),
        "merged": {
            path.name: digest(path)
            for path in sorted((run / "export" / "merged").glob("*.safetensors"))
        },
    }


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
