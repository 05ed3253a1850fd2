"""What the end-to-end tests share: small checkpoints, a small dataset, and fastft run as a user runs it."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from fastft import cli
from tests.families import make_checkpoint


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


def fastft(*arguments, timeout=300, env=None):
    """Run the command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "fastft", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_python(code, *arguments, timeout=300, env=None):
    """Run a script in a process of its own and return its last line as JSON; `env` is added to this one's."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def attempt(capfd):
    """Run the command line in this process (stock engine); returns (code, message)."""

    def run(*arguments):
        code = cli.run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, " ".join((out + err).split())

    return run


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(family, **overrides):
        key = f"{family}-{sorted(overrides.items())}"
        if key not in made:
            made[key] = make_checkpoint(family, tmp_path_factory.mktemp(family), **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """100 conversations of different lengths."""
    random.seed(0)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as out:
        for i in range(100):
            numbers = " ".join(str(random.randint(0, 99)) for _ in range(random.randint(1, 12)))
            question, answer = f"What is {numbers}?", f"The answer is {i}. 答えは{i}です。"
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture
def write_config(tmp_path, rows_file):
    """Write a config of nested values; what is not given is small and quick."""

    def write(base, **sections):
        values = {
            "project": "t",
            "output_dir": str(tmp_path / "runs"),
            "model": {
                "name": str(base),
                "max_seq_length": 128,
                "engine": "stock",
                "dtype": "float32",
            },
            "data": {"source": str(rows_file)},
            "lora": {"dropout": 0.1},
            "train": {"max_steps": 12, "save_steps": 4, "eval_steps": 6, "learning_rate": 3e-3},
        }
        for section, changes in sections.items():
            values[section] = (
                {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
            )
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def losses(run):
    """Return {step: loss} of a run's log."""
    lines = [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def start(config, *arguments):
    """Start `fastft train` and do not wait for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastft", "train", str(config), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_step(run, step, process, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "log.jsonl").exists() and f'"step": {step},' in (run / "log.jsonl").read_text():
            return
        if process.poll() is not None:
            raise AssertionError(process.stdout.read().decode()[-2000:])
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {seconds} s")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, checkpoint_of, rows_file):
    """A run of 12 steps with dropout 0.1 that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    values = {
        "project": "t",
        "output_dir": str(folder / "runs"),
        "model": {
            "name": str(checkpoint_of("qwen3")),
            "max_seq_length": 128,
            "engine": "stock",
            "dtype": "float32",
        },
        "data": {"source": str(rows_file)},
        "lora": {"dropout": 0.1},
        "train": {"max_steps": 24, "save_steps": 4, "eval_steps": 6, "learning_rate": 3e-3},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    outcome = fastft("train", config, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["status"] == "done"
    trace = losses(folder / "runs" / "t")
    assert sorted(trace) == list(range(1, 25))
    return config, folder / "runs" / "t", trace


@pytest.fixture
def fresh(uninterrupted, tmp_path):
    """The same config in another folder."""
    config, _, trace = uninterrupted
    path = tmp_path / "run.yaml"
    path.write_text(config.read_text().replace(str(config.parent / "runs"), str(tmp_path / "runs")))
    return path, tmp_path / "runs" / "t", trace
