"""Several processes train what one does, and end together when one of them ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from fastft.quickstart import write_task
from tests.e2e.conftest import fastft, losses, start, wait_for_step

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
WORKER = Path(__file__).parents[1] / "rank_worker.py"
SLACK = 1e-6
"""What the loss of a step may differ by: float32, other orders of summation."""


def ranks_of(launcher):
    """The processes that a launcher started, by their age."""
    children = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "train" in p.cmdline()]  # fmt: skip
    return sorted(children, key=lambda p: p.create_time())


def torchrun(processes, fault, config, *arguments, timeout=600):
    """Train in several processes of torchrun, with a fault of tests/rank_worker.py."""
    command = [*TORCHRUN, str(processes), str(WORKER), fault, str(config), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )  # fmt: skip


def said(text):
    """The sentences that fastft ended with: torchrun's own report is left out."""
    return [line for line in text.splitlines() if line.startswith(("error: ", "stopped after"))]


def test_two_then_three_processes_have_the_trace_of_one(fresh):
    """Two, of which one is killed, then torchrun's three with unequal budgets."""
    config, run, trace = fresh
    launcher = start(config, "--processes", 2)
    wait_for_step(run, 6, launcher)
    ranks_of(launcher)[1].kill()
    text = launcher.communicate(timeout=60)[0].decode()
    assert launcher.returncode == 3, text
    assert [line for line in text.splitlines() if "Traceback" in line] == []
    assert len(said(text)) == 1
    assert "was killed by SIGKILL" in said(text)[0]
    three = torchrun(3, "unequal budgets", config)
    assert three.returncode == 0, three.stderr
    assert three.stderr.count("resuming after step") == 1
    assert "processes 2 -> 3" in three.stderr.replace("\n", " ")
    assert three.stdout.count("done: ") == 1
    assert losses(run) == pytest.approx(trace, abs=SLACK)
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(s["unique_tokens"] == s["tokens"] for s in steps if "loss" in s), "summed"


@pytest.mark.long
def test_accelerate_launch_on_a_cpu_is_noticed(fresh):
    config, run, _ = fresh
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*command, "-m", "fastft", "train", str(config)], capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert done.returncode != 0
    assert "--processes N" in done.stderr
    assert not run.exists()


# --- the whole matrix


@pytest.fixture
def run_of(tmp_path, rows_file):
    """Write a config of 30 steps (the last of an epoch has two sequences) named `name`."""

    def write(base, name, source=rows_file, **train):
        rows = source.read_text(encoding="utf-8").splitlines()[:44]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        values = {
            "project": name,
            "output_dir": str(tmp_path / "runs"),
            "model": {"name": str(base), "max_seq_length": 128, "dtype": "float32", "engine": "stock"},
            "data": {"source": str(tmp_path / "rows.jsonl")},
            "lora": {"dropout": 0.1},
            "train": {"max_steps": 30, "save_steps": 4, "eval_steps": 10, "learning_rate": 1e-3},
        }  # fmt: skip
        values["model"]["engine"] = train.pop("engine", "stock")
        values["train"] |= train
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path, tmp_path / "runs" / name

    return write


def adapter(run):
    return load_file(run / "final" / "adapter_model.safetensors")


def distance(a, b):
    assert a.keys() == b.keys()
    return max(float(abs(a[name] - b[name]).max()) for name in a)


QUICKSTART = Path(__file__).parents[2] / "fastft" / "quickstart" / "base"


@pytest.mark.long
@pytest.mark.parametrize("engine", ["stock", "unsloth"])
@pytest.mark.parametrize("family", ["quickstart", "llama", "qwen3"])
def test_one_two_and_three_processes_train_alike(
    family, engine, run_of, checkpoint_of, rows_file, tmp_path
):
    source, allowed = rows_file, (SLACK, 5e-5)
    if family == "quickstart":
        base, source = QUICKSTART, write_task(tmp_path / "task").train
    else:
        base = checkpoint_of(family)
    config, one = run_of(base, "one", source, engine=engine)
    assert fastft("train", config).code == 0
    if family == "quickstart":
        # It learns its task within the 30 steps, and Adam makes large what a rounded gradient near
        # zero is: one process that cuts its rows otherwise says how far that goes.
        config, cut = run_of(base, "cut", source, engine=engine, micro_batch_tokens=50)
        assert fastft("train", config).code == 0
        found = max(abs(losses(cut)[step] - loss) for step, loss in losses(one).items())
        allowed = 4 * found, 4 * distance(adapter(cut), adapter(one))
        print(f"one process, other rows: loss {found:.1e}, adapter {allowed[1] / 4:.1e}")
    for processes in (2, 3):
        config, run = run_of(base, f"of{processes}", source, engine=engine)
        done = torchrun(processes, "unequal budgets", config)
        assert done.returncode == 0, done.stderr[-3000:]
        trace, reference = losses(run), losses(one)
        worst = max(abs(trace[step] - reference[step]) for step in reference)
        print(f"{family} {engine}: {processes} processes, loss {worst:.1e}, ", end="")
        print(f"adapter {distance(adapter(run), adapter(one)):.1e}")
        assert len(trace) == 30
        assert worst <= allowed[0]
        assert distance(adapter(run), adapter(one)) <= allowed[1]


@pytest.mark.long
def test_started_with_two_resumed_with_three_finished_with_one(run_of, checkpoint_of):
    base = checkpoint_of("llama")
    config, one = run_of(base, "one")
    assert fastft("train", config).code == 0
    config, run = run_of(base, "many")
    assert fastft("train", config, "--processes", 2, "--stop-after", 10).code == 0
    assert torchrun(3, "unequal budgets", config, "--stop-after", 10).returncode == 0
    assert fastft("train", config).code == 0
    assert losses(run) == pytest.approx(losses(one), abs=SLACK)
    assert distance(adapter(run), adapter(one)) <= 5e-5


@pytest.mark.long
@pytest.mark.parametrize("share_prefixes", [True, False])
def test_beginnings_shared_over_processes(share_prefixes, run_of, checkpoint_of, tmp_path):
    """Sequences with a common beginning, without dropout (which keeps beginnings apart)."""
    source = tmp_path / "alike.jsonl"
    asked = [f"{'A long beginning. ' * 3}{'BA'[i % 2] * 20} number {i}?" for i in range(44)]
    turns = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": f"It is {i}."}]
        for i, a in enumerate(asked)
    ]
    source.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    off = [
        "--set",
        "lora.dropout=0",
        "--set",
        f"train.share_prefixes={str(share_prefixes).lower()}",
    ]
    config, one = run_of(checkpoint_of("llama"), "one", source)
    assert fastft("train", config, *off).code == 0
    for processes in (2, 3):
        config, run = run_of(checkpoint_of("llama"), f"of{processes}", source)
        done = torchrun(processes, "unequal budgets", config, *off)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        worst = max(abs(losses(run)[step] - loss) for step, loss in losses(one).items())
        part = sum(s["unique_tokens"] for s in steps) / sum(s["tokens"] for s in steps)
        print(f"sharing {share_prefixes}: {processes} processes, loss {worst:.1e}, ", end="")
        print(f"adapter {distance(adapter(run), adapter(one)):.1e}, computed {part:.0%}")
        assert (part < 0.95) if share_prefixes else (part == 1)
        assert worst <= SLACK
        assert distance(adapter(run), adapter(one)) <= 5e-5


@pytest.mark.long
def test_any_process_killed_at_any_moment(run_of, checkpoint_of):
    """kill -9 of the first or the second process, ten times: three times while they start, then
    after a step of their own; then the same command finishes.
    """
    config, one = run_of(checkpoint_of("llama"), "one", max_steps=80, save_steps=10)
    assert fastft("train", config).code == 0
    config, run = run_of(checkpoint_of("llama"), "killed", max_steps=80, save_steps=10)
    draw, reached = random.Random(1), []
    for number in range(10):
        launched, launcher = time.time(), start(config, "--processes", 2)
        while len(ranks_of(launcher)) < 2:
            time.sleep(0.05)
        log = run / "log.jsonl"
        while number > 2 and launcher.poll() is None:
            if log.exists() and log.stat().st_mtime > launched + 1 and losses(run):
                break
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 8 if number < 3 else 0.25))
        victims = ranks_of(launcher)
        if len(victims) == 2:
            victims[draw.randrange(2)].kill()
        began = time.monotonic()
        text = launcher.communicate(timeout=120)[0].decode()
        took = time.monotonic() - began
        reached.append(max(losses(run), default=0) if log.exists() else 0)
        code = launcher.returncode
        print(f"kill {number}: ended {took:.1f} s later, step {reached[-1]}, code {code}")
        assert took < 30
        assert code in (0, 3), text
        assert len(said(text)) == (1 if code else 0), text
        assert "Traceback" not in text
    assert sum(0 < step < 80 for step in reached) >= 4, "most kills did not meet a training run"
    assert fastft("train", config, "--processes", 2).code == 0
    assert losses(run) == pytest.approx(losses(one), abs=SLACK)


@pytest.mark.long
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_hangs_ends_all(stopped, fresh):
    config, run, trace = fresh
    config.write_text(config.read_text().replace("train:", "train:\n  lost_after_minutes: 0.5"))
    launcher = start(config, "--processes", 2)
    wait_for_step(run, 6, launcher)
    ranks_of(launcher)[stopped].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    text = launcher.communicate(timeout=300)[0].decode()
    print(f"ended after {time.monotonic() - began:.0f} s: {said(text)}")
    assert launcher.returncode == 3, text
    assert len(said(text)) == 1
    assert "hangs" in said(text)[0]
    assert fastft("train", config, "--processes", 2).code == 0
    assert losses(run) == pytest.approx(trace, abs=SLACK)


@pytest.mark.long
def test_out_of_memory_in_one_process(fresh):
    """Its rows get smaller, the other's do not, and nothing changes; where one sequence is too long, all end."""
    config, run, trace = fresh
    failed = torchrun(2, "no memory", config)
    assert failed.returncode != 0
    assert len(said(failed.stderr)) == 1, failed.stderr
    assert "out of memory on a single sequence" in said(failed.stderr)[0]
    done = torchrun(2, "small memory", config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == pytest.approx(trace, abs=SLACK)


@pytest.mark.long
def test_a_full_disk_in_the_first_process(fresh):
    config, run, trace = fresh
    full = torchrun(2, "full disk", config)
    assert full.returncode != 0
    assert len(said(full.stderr)) == 1, full.stderr
    assert "No space left on device" in said(full.stderr)[0]
    done = torchrun(2, "none", config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming after step 4" in done.stderr
    assert losses(run) == pytest.approx(trace, abs=SLACK)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_at_the_launcher(number, fresh):
    config, run, trace = fresh
    launcher = start(config, "--processes", 2)
    wait_for_step(run, 6, launcher)
    launcher.send_signal(number)
    text = launcher.communicate(timeout=120)[0].decode()
    assert launcher.returncode == 130, text
    assert len(said(text)) == 1, text
    assert "state saved" in said(text)[0]
    done = fastft("train", config, "--processes", 2)
    assert done.code == 0
    assert "resuming after step" in done.err
    assert losses(run) == pytest.approx(trace, abs=SLACK)


@pytest.mark.long
def test_the_drop_in_trainer_does_the_same(tmp_path, checkpoint_of):
    script, base = WORKER.with_name("sft_worker.py"), checkpoint_of("llama")
    traces = []
    for processes in (1, 2, 3):
        folder = tmp_path / f"of{processes}"
        done = subprocess.run(
            [*TORCHRUN, str(processes), str(script), str(base), str(folder)],
            capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = [
            json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"losses"')
        ]
        assert [f["processes"] for f in found] == [processes]
        assert (folder / "checkpoint-9" / "adapter_model.safetensors").is_file()
        traces.append(found[0]["losses"])
    assert len(traces[0]) == 9
    for trace in traces[1:]:
        assert trace == pytest.approx(traces[0], abs=SLACK)


@pytest.mark.long
@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("nf4", "bfloat16")]
)
def test_a_base_spread_over_two_processes(quantization, dtype, run_of, checkpoint_of):
    """The same rows in both: in bfloat16 another cut of a step rounds otherwise (1.5e-3 in 30 steps)."""
    base, budget = checkpoint_of("llama"), 90 if dtype == "float32" else 1
    change = ["--set", f"model.quantization={quantization}", "--set", f"model.dtype={dtype}",
              "--set", f"train.micro_batch_tokens={budget}", "--set", "train.fused_layers=false"]  # fmt: skip
    config, one = run_of(base, "one")
    assert fastft("train", config, *change).code == 0
    config, run = run_of(base, "spread")
    shard = [*change, "--set", "train.shard_base=true", "--processes", 2]
    done = fastft("train", config, *shard)
    assert done.code == 0, done.err
    assert "base spread over 2 processes" in done.err
    trace, reference = losses(run), losses(one)
    worst = max(abs(trace[step] - reference[step]) for step in reference)
    print(
        f"{quantization} {dtype}: loss {worst:.1e}, adapter {distance(adapter(run), adapter(one)):.1e}"
    )
    assert worst <= 1e-4
    assert adapter(run).keys() == adapter(one).keys()
    assert not [name for name in adapter(run) if "base_layer" in name]
