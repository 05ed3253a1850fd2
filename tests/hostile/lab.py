"""What the attacks are made on: a tiny base, a finished run, its exports; made once, then copied."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from fastft import cli
from tests.families import make_checkpoint

SETTINGS = {
    "project": "t",
    "model": {"max_seq_length": 64, "engine": "stock", "dtype": "float32"},
    "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "train": {"max_steps": 2, "save_steps": 1, "eval_steps": 2, "effective_batch_size": 2},
    "data": {"eval_fraction": 0.2},
}


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    code: int
    text: str
    seconds: float

    def problem(self, allowed: set[int], limit: float) -> str | None:
        """What is wrong with it: the code, a traceback, a "bug", no message, two, or its time."""
        errors = [line for line in self.text.splitlines() if line.startswith(("error:", "Error:"))]
        checks = {
            f"exit code {self.code}": self.code not in allowed,
            "a traceback": "Traceback" in self.text,
            "called a bug": "bug of fastft" in self.text,
            f"{len(errors)} messages": self.code in {2, 3} and len(errors) != 1,
            f"{len(self.text):,} characters": len(self.text) > 12_000,
            f"{self.seconds:.1f} s": self.seconds > limit,
        }
        found = [what for what, is_so in checks.items() if is_so]
        return ", ".join(found) or None


class Lab:
    """A folder with `base`, `rows.jsonl`, `run` (finished, exported), and room for copies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        made_before = (folder / "runs" / "t" / "export" / "merged").is_dir()
        self.base = folder / "base" if made_before else make_checkpoint("llama", folder / "base")
        self.rows = folder / "rows.jsonl"
        numbers = random.Random(0)
        turns = [
            (f"What is {numbers.randint(0, 99)} and {i}?", f"The answer is {i}.") for i in range(30)
        ]
        self.rows.write_text(
            "\n".join(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": q},
                            {"role": "assistant", "content": a},
                        ]
                    }
                )
                for q, a in turns
            )
        )
        self.count = 0
        self.room: Path = folder
        self.config_file = self.config(folder)
        self.run = folder / "runs" / "t"
        for arguments in (
            ()
            if made_before
            else (
                ["train", self.config_file],
                ["export", self.run, "--to", "merged,gguf:f16,gguf-lora", "--no-verify"],
            )
        ):
            done = attempt(arguments)
            assert done.code == 0, done.text

    def new_room(self) -> Path:
        """Return an empty folder for one attack; the one before it is removed."""
        if self.room != self.folder:
            shutil.rmtree(self.room, ignore_errors=True)
        self.count += 1
        self.room = self.folder / f"room-{self.count}"
        shutil.rmtree(self.room, ignore_errors=True)  # of a call that was ended here
        self.room.mkdir()
        return self.room

    def config(self, room: Path, **sections) -> Path:
        """Write a config of `SETTINGS` with changed sections; returns its path."""
        values = {**SETTINGS, "output_dir": str(room / "runs")}
        values["model"] = {**values["model"], "name": str(self.base)}
        values["data"] = {**values["data"], "source": str(self.rows)}
        for section, changes in sections.items():
            merge = isinstance(changes, dict) and isinstance(values.get(section), dict)
            values[section] = {**values[section], **changes} if merge else changes
        path = room / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def copy_of(self, what: Path) -> Path:
        """Return a copy of a folder in the attack's room; files are links until they are changed."""
        target = self.room / what.name
        shutil.copytree(what, target, copy_function=os.link, symlinks=True)
        return target


def replace(path: Path, content: bytes | str) -> None:
    """Give a file (a hard link of the lab's) a content of its own."""
    path.unlink(missing_ok=True)
    path.write_bytes(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    )


def attempt(arguments) -> Outcome:
    """Run one command in this process."""
    out, began = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = cli.run([str(argument) for argument in arguments])
    return Outcome(code, out.getvalue(), time.monotonic() - began)
