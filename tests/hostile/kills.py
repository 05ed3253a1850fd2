"""SIGKILL at random moments of train, data, export, verify, push and quickstart; then the same call
again.

    python -m tests.hostile.kills --kills 10 [--command export] [--seed N]

After every kill no process of the command may be left five seconds later. The same call follows
until one ends by itself: its files are the undisturbed ones, and neither a lock nor a temporary
folder is left where it wrote or in the system's temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
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
import uuid
from pathlib import Path

import psutil
import yaml

from tests.hostile.lab import SETTINGS, Lab
from tests.hub_stand_in import TOKEN, HubStandIn

COMMANDS = ("train", "data", "export", "verify", "push", "quickstart")
QUICKSTART = """
import sys
import fastft.quickstart.command as command
from fastft.__main__ import main

config, questions = command.quickstart_config, command.read_questions
few = {"max_steps": 6, "save_steps": 2, "eval_steps": 3}
command.quickstart_config = lambda *given: (
    (made := config(*given)) | {"train": made["train"] | few}
)
command.read_questions = lambda path: questions(path)[:4]
command.AT_LEAST = 0.0
sys.argv = ["fastft", "quickstart", "--engine", "stock", *sys.argv[1:]]
main()
"""
"""The quickstart with few steps and questions: its whole way, in seconds."""
VOLATILE = {"certificate.json", "certificate.md", "run.json", "log.jsonl", "report.md", "data.png"}
VOLATILE |= {"loss.png", "README.md", "run.yaml", "manifest.json"}
"""These name folders or times; manifest.json holds the hash of one of them."""


class Site:
    """A place for one command: its arguments, environment, and what counts as its outcome."""

    def __init__(self, lab: Lab, folder: Path, command: str, hub: HubStandIn) -> None:
        self.folder, self.command, self.hub = folder, command, hub
        # Beside the folder: a disk that fails below it must not swallow the message.
        self.log = folder.with_name(f"{folder.name}.txt")
        folder.mkdir(parents=True)
        self.run = folder / "t"
        if command in {"export", "verify", "push"}:
            shutil.copytree(lab.run, self.run)
        self.out = folder / "out"
        self.mark, self.temporary = uuid.uuid4().hex, folder / "tmp"
        self.temporary.mkdir()
        if command == "verify":
            self.out.mkdir()
            for path in (lab.run / "export").glob("*.F16.gguf"):
                shutil.copy2(path, self.out)
        config = folder / "run.yaml"
        values = SETTINGS | {"output_dir": str(folder / "runs")}
        values["model"] = SETTINGS["model"] | {"name": str(lab.base)}
        values["data"] = SETTINGS["data"] | {"source": str(lab.rows)}
        config.write_text(yaml.safe_dump(values))
        self.arguments = {
            "train": ["train", config, "--set", "train.eval_steps=1", "--set", "train.max_steps=6"],
            "data": ["data", config],
            "export": ["export", self.run, "--to", "adapter,merged,gguf:q8_0,gguf-lora,ollama",
                       "--out", self.out, "--no-verify"],
            "verify": ["verify", self.run, "--out", self.out],
            "push": ["push", self.run, "--repo", "me/x", "--base-id", "owner/base"],
            "quickstart": ["--out", folder / "runs"],
        }[command]  # fmt: skip

    def start(self) -> subprocess.Popen:
        """Start the command in a process of its own."""
        environment = os.environ | {
            "FASTFT_KILL_MARK": self.mark, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": self.hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "PYTHONHASHSEED": "0",  # peft writes target_modules in the order of a set
            "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
        }  # fmt: skip
        how = ["-c", QUICKSTART] if self.command == "quickstart" else ["-m", "fastft"]
        command = [sys.executable, *how, *map(str, self.arguments)]
        with self.log.open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def left(self) -> list[int]:
        """Return the processes that carry this site's mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get("FASTFT_KILL_MARK") == self.mark:
                    found.append(process.pid)
        return found

    def is_killed(self, after: float) -> bool:
        """Start it and kill it `after` so many seconds; False where it had ended by itself."""
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 5
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.left(), f"{self.command}: {self.left()} outlived a kill after {after:.1f} s"
        return killed

    def finish(self) -> float:
        """Run it to its end; returns the seconds."""
        began = time.monotonic()
        code = self.start().wait(900)
        text = self.log.read_text()
        assert code == 0, f"{self.command} ended with {code}:\n{text[-2000:]}"
        return time.monotonic() - began

    def outcome(self) -> dict[str, str]:
        """Return {file: sha256} of what the command wrote, and the names of the volatile files."""
        places = [self.out, self.folder / "runs", self.run]
        found = {}
        for place in places:
            for path in sorted(place.rglob("*")):
                if path.is_file() and "checkpoints" not in path.parts:
                    name = str(path.relative_to(self.folder))
                    hashed = hashlib.sha256(path.read_bytes()).hexdigest()
                    found[name] = "there" if path.name in VOLATILE else hashed
        repo = self.hub.repos.get(("models", "me/x"))
        found["pushed"] = str(sorted(repo.files)) if repo and self.command == "push" else ""
        leftovers = [path.name for path in self.temporary.iterdir()]
        assert not leftovers, f"left in the temporary folder: {leftovers}"
        return found


def check_equal(expected: dict[str, str], found: dict[str, str], what: str) -> None:
    """Raise AssertionError naming the files that differ."""
    names = expected.keys() | found.keys()
    differing = sorted(n for n in names if expected.get(n) != found.get(n))
    assert not differing, f"{what} differs: {differing}"


def survive(kills: int, seed: int, commands=COMMANDS, say=print) -> dict[str, int]:
    """Kill each command `kills` times; raises AssertionError where something is left or differs."""
    chance, done = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as name, HubStandIn() as hub:
        folder = Path(name)
        hub.add("owner/base", {"config.json": b"{}"})
        lab = Lab(folder / "lab") if (folder / "lab").mkdir() is None else None
        for command in commands:
            site = Site(lab, folder / f"{command}-undisturbed", command, hub)
            seconds = site.finish()
            expected = site.outcome()
            done[command] = runs = 0
            while done[command] < kills:
                runs += 1
                site = Site(lab, folder / f"{command}-{runs}", command, hub)
                while done[command] < kills and site.is_killed(seconds * chance.uniform(0.1, 0.95)):
                    done[command] += 1
                seconds = min(seconds, max(site.finish(), 1.0))  # the first one met a cold cache
                check_equal(expected, site.outcome(), f"{command} after {done[command]} kills")
                shutil.rmtree(site.folder)
            say(f"{command}: {done[command]} kills, {runs} runs, {len(expected)} files equal")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--command", choices=COMMANDS, action="append")
    arguments = parser.parse_args()
    print(json.dumps(survive(arguments.kills, arguments.seed, arguments.command or COMMANDS)))


if __name__ == "__main__":
    main()
