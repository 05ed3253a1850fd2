"""Bad input by the hundred, drawn with a seed: what a person, a disk or an enemy may hand to fastft.

    python -m tests.hostile.attacks [--seed N] [--group NAME] [--every K]

prints each attack that did not end as promised: exit code 2 (or another that is named), one message,
no traceback, nothing called a bug, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from fastft.config import RunConfig
from tests.hostile.lab import Lab, attempt, replace

LIMIT_SECONDS = 60.0
GOOD_OR_BAD = frozenset({0, 2})  # a mutation may happen to be harmless


@dataclass(frozen=True)
class Attack:
    """One bad input: `make` prepares it in the lab's room and returns the command's arguments."""

    name: str
    make: Callable[[Lab], list[object]]
    codes: frozenset[int] = frozenset({2})


GROUPS: dict[str, Callable[[random.Random], Iterator[Attack]]] = {}


def group(make: Callable[[random.Random], Iterator[Attack]]):
    """Register a generator of attacks under its name."""
    GROUPS[make.__name__] = make
    return make


def attacks(seed: int) -> list[Attack]:
    """Return all attacks of a seed, the same ones each time."""
    return [
        attack for name, make in GROUPS.items() for attack in make(random.Random(f"{seed}-{name}"))
    ]


# --- the config

NONSENSE = [
    ".inf",
    "-.inf",
    ".nan",
    "-1",
    "1" + "0" * 40,
    "[1, 2]",
    "{a: b}",
    "''",
    "true",
    "1e400",
]
NONSENSE += ['"\\0"', '"\\uD800"', "!!binary aGk=", "2020-01-01", "0x", "'" + "x" * 3000 + "'", "~"]


@group
def settings(chance: random.Random) -> Iterator[Attack]:
    """Each setting with values of every wrong kind."""
    for section, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key in [f"{section}.{name}" for name in inner] if inner else [section]:
            for value in chance.sample(NONSENSE, 3):
                if key in {"model.name", "data.source", "data.eval_source"} and value == "true":
                    continue
                yield Attack(f"{key}={value[:20]}", _set(key, value), GOOD_OR_BAD)


def _set(key: str, value: str):
    def make(lab: Lab) -> list[object]:
        *parents, last = key.split(".")
        path = lab.config(lab.room)
        lines = path.read_text().split("\n")
        text = f"{last}: {value}"
        if not parents:
            kept = [line for line in lines if not line.startswith(f"{last}:")]
            path.write_text("\n".join([*kept, text]))
        else:
            kept = [line for line in lines if not line.startswith(f"  {last}:")]
            at = next((i for i, line in enumerate(kept) if line == f"{parents[0]}:"), None)
            if at is None:
                kept += [f"{parents[0]}:", f"  {text}"]
            else:
                kept.insert(at + 1, f"  {text}")
            path.write_text("\n".join(kept))
        return ["data", path]

    return make


YAMLS: dict[str, bytes] = {
    "aliases": b"a: &a [x, x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 112)
    ),
    "deep": b"a: " + b"[" * 3000 + b"]" * 3000,
    "deep maps": b"\n".join(b" " * i + b"a:" for i in range(1500)),
    "a list as key": b"? [a, b]\n: 1\nmodel: {name: x}",
    "a map as key": b"? {a: b}\n: 1\n",
    "a nested list as key": b"model: {? [name] : x}",
    "null key": b"~: 1\nmodel: {name: x}",
    "number keys": b"1: 2\n3.5: 4\ntrue: 5",
    "nul": b"project: a\0b",
    "control": b"project: a\x07b",
    "utf-16": "project: a".encode("utf-16"),
    "latin-1": "project: \xe4".encode("latin-1"),
    "python object": b"!!python/object/apply:os.system ['true']",
    "two documents": b"project: a\n---\nproject: b",
    "itself": b"&a [*a]",
    "itself in a map": b"model: &a {name: *a}",
    "merge of itself": b"a: &a\n  <<: *a",
    "merge of a number": b"<<: 3\nmodel: {name: x}",
    "unknown alias": b"a: *b",
    "huge number": b"train: {seed: " + b"9" * 6000 + b"}",
    "a huge line": b"project: " + b"x" * 3_000_000,
    "many keys": b"\n".join(b"k%d: 1" % i for i in range(20_000)),
    "bad date": b"project: 2020-99-99",
    "bad binary": b"project: !!binary '***'",
    "set": b"project: !!set {a, b}",
    "unknown tag": b"project: !nonsense x",
    "only a comment": b"# nothing",
    "a number": b"42",
    "a tab": b"model:\n\tname: x",
    "bom and nothing": b"\xef\xbb\xbf",
    "percent": b"%YAML 9.9\n---\na: b",
    "sections are lists": b"model: []\ndata: []\ntrain: 3\nlora: x",
    "sexagesimal": b"train: {seed: 190:20:30}",
}


@group
def yamls(chance: random.Random) -> Iterator[Attack]:
    """Files that are no config, and some that are no YAML."""
    for name, content in YAMLS.items():
        yield Attack(name, _file_config(content))
    for number in range(10):
        noise = chance.randbytes(chance.randint(1, 400))
        yield Attack(f"noise {number}", _file_config(noise))


def _file_config(content: bytes):
    def make(lab: Lab) -> list[object]:
        (lab.room / "run.yaml").write_bytes(content)
        return ["plan", lab.room / "run.yaml"]

    return make


# --- files of a model, an adapter, a run

SHAPES = ["", "[]", "null", '"x"', "{}", "3", '{"a": ', "[" * 20_000, '{"a": NaN}', "\0" * 64]
SHAPES += ["\ud800", "[[]]", '{"files": 3}', '{"model": null}', "true", '[{"step": "x"}]', "{}\n{}"]


def _shape(
    path: str, content: str | bytes, where: str, command: Callable[[Lab, Path], list[object]]
):
    def make(lab: Lab) -> list[object]:
        folder = lab.copy_of(getattr(lab, where))
        replace(folder / path, content)
        return command(lab, folder)

    return make


def _special(path: str, kind: str, where: str, command: Callable[[Lab, Path], list[object]]):
    def make(lab: Lab) -> list[object]:
        folder = lab.copy_of(getattr(lab, where))
        target = folder / path
        target.unlink(missing_ok=True)
        if kind == "folder":
            target.mkdir()
        elif kind == "dangling link":
            target.symlink_to(folder / "blobs" / "gone")
        elif kind == "link to itself":
            target.symlink_to(target)
        elif kind == "pipe":
            os.mkfifo(target)
        return command(lab, folder)

    return make


def _mutated(path: str, seed: str, where: str, command: Callable[[Lab, Path], list[object]]):
    """Change one value of a JSON file into one of another kind, or one byte of any other file."""

    def make(lab: Lab) -> list[object]:
        folder, chance = lab.copy_of(getattr(lab, where)), random.Random(seed)
        content = (folder / path).read_bytes()
        try:
            values = json.loads(content)
        except ValueError:
            at = chance.randrange(max(1, min(len(content), 4000)))
            changed = bytearray(content)
            changed[at] = chance.randrange(256)
            replace(folder / path, bytes(changed))
        else:
            replace(folder / path, json.dumps(_changed(values, chance)))
        return command(lab, folder)

    return make


WRONG = [None, "x", -1, 0, 10**30, 1e308, [], {}, True, ["x"], {"a": 1}, "", 3.5, "\ud800"]


def _changed(value, chance: random.Random):
    """Return `value` with one inner value replaced; sometimes a key is dropped."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        if chance.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        return [*value[:at], _changed(value[at], chance), *value[at + 1 :]]
    return chance.choice(WRONG)


def _chat(lab: Lab, folder: Path) -> list[object]:
    return ["chat", folder, "-p", "hi", "--max-new-tokens", 1]


def _data(lab: Lab, folder: Path) -> list[object]:
    return ["data", lab.config(lab.room, model={"name": str(folder)})]


def _plan(lab: Lab, folder: Path) -> list[object]:
    return ["plan", lab.config(lab.room, model={"name": str(folder)})]


def _train(lab: Lab, folder: Path) -> list[object]:
    return ["train", lab.config(lab.room, model={"name": str(folder)}, train={"max_steps": 1})]


def _export(lab: Lab, folder: Path) -> list[object]:
    return ["export", folder, "--to", "merged,gguf-lora", "--out", lab.room / "o", "--no-verify"]


def _gguf(lab: Lab, folder: Path) -> list[object]:
    return ["export", folder, "--to", "gguf:f16", "--out", lab.room / "o", "--no-verify"]


MODEL_FILES = {
    "config.json": (_chat, _plan, _train),
    "tokenizer.json": (_data, _chat),
    "tokenizer_config.json": (_data, _chat),
    "generation_config.json": (_chat,),
    "model.safetensors": (_chat, _plan),
    "model.safetensors.index.json": (_chat, _plan),
    "special_tokens_map.json": (_data,),
    "chat_template.jinja": (_data,),
}


@group
def models(chance: random.Random) -> Iterator[Attack]:
    """Every file of a model folder: empty, cut, foreign, of a wrong shape, no file at all."""
    for path, commands in MODEL_FILES.items():
        for content in chance.sample(SHAPES, 6):
            command = chance.choice(commands)
            yield Attack(
                f"{command.__name__[1:]} {path} = {content[:12]!r}",
                _shape(path, content, "base", command), GOOD_OR_BAD,
            )  # fmt: skip
        for kind in ("folder", "dangling link", "link to itself", "pipe"):
            command = chance.choice(commands)
            yield Attack(
                f"{command.__name__[1:]} {path} is a {kind}",
                _special(path, kind, "base", command), GOOD_OR_BAD,
            )  # fmt: skip
    for number in range(60):
        path = chance.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
        command = chance.choice(MODEL_FILES[path])
        yield Attack(
            f"{command.__name__[1:]} {path} mutation {number}",
            _mutated(path, f"{chance.random()}", "base", command), GOOD_OR_BAD | {3},
        )  # fmt: skip
    for number in range(10):
        yield Attack(
            f"chat model.safetensors byte {number}",
            _mutated("model.safetensors", f"{chance.random()}", "base", _chat), GOOD_OR_BAD,
        )  # fmt: skip


ROPES = [
    {"rope_type": "yarn", "factor": 0}, {"rope_type": "nonsense"}, {"rope_type": "linear", "factor": -1},
    {"rope_type": "llama3"}, {"rope_type": "longrope", "short_factor": []}, {"type": "dynamic", "factor": "x"},
    {"rope_type": "yarn", "factor": 1e308}, [], "x", {"rope_type": None},
]  # fmt: skip


@group
def nonsense(chance: random.Random) -> Iterator[Attack]:
    """A config.json that is valid and means nothing."""
    changes = [{"rope_scaling": rope} for rope in ROPES] + [
        {"rope_parameters": rope} for rope in ROPES
    ]
    changes += [
        {"dtype": "float7"}, {"torch_dtype": 3}, {"hidden_size": 0}, {"num_attention_heads": 0},
        {"num_attention_heads": 7}, {"num_hidden_layers": -1}, {"num_hidden_layers": 10**9},
        {"vocab_size": 1}, {"vocab_size": 10**15}, {"hidden_act": "nonsense"}, {"model_type": "nonsense"},
        {"model_type": 3}, {"architectures": "x"}, {"architectures": [3]}, {"head_dim": -8},
        {"num_key_value_heads": 0}, {"num_key_value_heads": 3}, {"max_position_embeddings": 0},
        {"max_position_embeddings": "x"}, {"rms_norm_eps": "x"}, {"rope_theta": 0}, {"rope_theta": "x"},
        {"quantization_config": {"quant_method": "nonsense"}}, {"quantization_config": 3},
        {"quantization_config": {"quant_method": "bitsandbytes"}}, {"tie_word_embeddings": "x"},
        {"auto_map": {"AutoConfig": "evil.Evil"}}, {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}},
        {"eos_token_id": 10**9}, {"eos_token_id": "x"}, {"bos_token_id": [1]}, {"pad_token_id": -5},
        {"intermediate_size": 1.5}, {"attention_bias": "x"}, {"mlp_bias": True}, {"layer_types": ["x"]},
    ]  # fmt: skip
    for number, change in enumerate(changes):
        command = (_chat, _plan, _gguf, _train)[number % 4]
        yield Attack(
            f"{command.__name__[1:]} {json.dumps(change)[:60]}", _config(change, command),
            GOOD_OR_BAD | {1, 3},
        )  # fmt: skip


def _config(change: dict, command: Callable[[Lab, Path], list[object]]):
    def make(lab: Lab) -> list[object]:
        folder = lab.copy_of(lab.base)
        values = json.loads((folder / "config.json").read_text()) | change
        replace(folder / "config.json", json.dumps(values))
        return command(lab, folder)

    return make


RUN_FILES = {
    "run.yaml": ("export", "push", "train"),
    "run.json": ("export", "push", "train"),
    "log.jsonl": ("train", "export"),
    "samples.jsonl": ("imatrix", "train"),
    "final/adapter_config.json": ("export", "chat", "push"),
    "final/adapter_model.safetensors": ("export", "chat"),
    "final/manifest.json": ("export", "train"),
    "final/tokenizer.json": ("chat", "export"),
    "final/tokenizer_config.json": ("chat", "export"),
    "final/config.json": ("export",),
    "final/README.md": ("push",),
    "checkpoints/checkpoint-2/manifest.json": ("train",),
    "checkpoints/checkpoint-2/optimizer.pt": ("train",),
    "checkpoints/checkpoint-2/trainer_state.json": ("train",),
    "export/certificate.json": ("push", "export"),
    "export/merged/config.json": ("chat", "export"),
}


def _run_command(lab: Lab, run: Path, what: str, path: str) -> list[object]:
    target = run / "final" if what == "chat" and path.startswith("final/") else run
    target = run / "export" / "merged" if path.startswith("export/merged") else target
    if what == "export" and path.startswith("export/merged"):
        target = run
    config = lab.config(lab.room, output_dir=str(run.parent), project=run.name)
    return {
        "export": ["export", target, "--to", "merged,gguf-lora", "--no-verify"],
        "chat": ["chat", target, "-p", "hi", "--max-new-tokens", 1],
        "train": ["train", config],
        "push": ["push", run, "--repo", "me/x", "--base-id", "a/b", "--include", "gguf"],
        "imatrix": ["export", run, "--to", "gguf:q2_k", "--imatrix", "auto", "--no-verify"],
    }[what]


@group
def runs(chance: random.Random) -> Iterator[Attack]:
    """Every file of a run."""
    for path, commands in RUN_FILES.items():
        for content in chance.sample(SHAPES, 4):
            what = chance.choice(commands)
            yield Attack(
                f"{what} {path} = {content[:12]!r}", _on_run(path, what, content), GOOD_OR_BAD
            )
        for number in range(3):
            what = chance.choice(commands)
            yield Attack(
                f"{what} {path} mutation {number}",
                _on_run(path, what, None, f"{chance.random()}"), GOOD_OR_BAD,
            )  # fmt: skip
        what = chance.choice(commands)
        yield Attack(f"{what} {path} is a dangling link", _on_run(path, what, "link"), GOOD_OR_BAD)


def _on_run(path: str, what: str, content: str | None, seed: str = ""):
    def command(lab: Lab, run: Path) -> list[object]:
        return _run_command(lab, run, what, path)

    def make(lab: Lab) -> list[object]:
        (lab.run / "export").mkdir(exist_ok=True)
        if not (lab.run / path).is_file():
            (lab.run / path).write_text('{"files": {}}')
        if content == "link":
            return _special(path, "dangling link", "run", command)(lab)
        if content is None:
            return _mutated(path, seed, "run", command)(lab)
        return _shape(path, content, "run", command)(lab)

    return make


@group
def adapters(chance: random.Random) -> Iterator[Attack]:
    """Adapters of other tools: weights that are NaN, of another shape, or not weights."""
    import numpy as np

    for name, change in {
        "nan": lambda w: np.full_like(w, np.nan),
        "inf": lambda w: np.full_like(w, np.inf),
        "turned": lambda w: np.ascontiguousarray(w.T),
        "empty": lambda w: w[:0],
        "whole numbers": lambda w: w.astype(np.int64),
        "one row more": lambda w: np.vstack([w, w[:1]]),
        "flat": lambda w: w.reshape(-1),
        "a number": lambda w: w.reshape(-1)[:1].reshape(()),
    }.items():
        for command in (_chat, _export):
            codes = GOOD_OR_BAD | ({3} if name in {"nan", "inf"} else set())
            yield Attack(f"{command.__name__[1:]} {name}", _weights(change, command), codes)
    values = [
        {"r": 0}, {"r": -1}, {"r": "x"}, {"r": 10**9}, {"lora_alpha": "x"}, {"lora_alpha": float("nan")},
        {"peft_type": "NONSENSE"}, {"peft_type": None}, {"peft_type": "PREFIX_TUNING"}, {"bias": "all"},
        {"target_modules": None}, {"target_modules": 3}, {"target_modules": "(a+)+$"},
        {"target_modules": []}, {"base_model_name_or_path": 3}, {"base_model_name_or_path": "\0"},
        {"base_model_name_or_path": "no/such"}, {"base_model_name_or_path": ["x"]}, {"task_type": "X"},
        {"rank_pattern": {"(": 3}}, {"rank_pattern": 3}, {"alpha_pattern": {"q_proj": "x"}},
        {"use_dora": True}, {"use_dora": "x"}, {"modules_to_save": ["nonsense"]}, {"modules_to_save": 3},
        {"layers_to_transform": "x"}, {"revision": 3}, {"trainable_token_indices": "x"},
        {"lora_bias": True}, {"fan_in_fan_out": "x"}, {"layer_replication": [[0, 9]]}, {"loftq_config": 3},
    ]  # fmt: skip
    for change in values:
        for command in (_chat, _export):
            # Without a network nobody knows whether there is such a model on the Hub.
            codes = GOOD_OR_BAD | ({3} if "no/such" in change.values() else set())
            yield Attack(
                f"{command.__name__[1:]} adapter {json.dumps(change)[:50]}",
                _adapter_config(change, command), codes,
            )  # fmt: skip


def _foreign_adapter(lab: Lab) -> Path:
    folder = lab.copy_of(lab.run / "final")
    (folder / "manifest.json").unlink()
    return folder


def _weights(change: Callable, command: Callable[[Lab, Path], list[object]]):
    def make(lab: Lab) -> list[object]:
        from safetensors.numpy import load_file, save_file

        folder = _foreign_adapter(lab)
        path = folder / "adapter_model.safetensors"
        weights = {name: change(weight) for name, weight in load_file(path).items()}
        path.unlink()
        save_file(weights, path)
        return command(lab, folder)

    return make


def _adapter_config(change: dict, command: Callable[[Lab, Path], list[object]]):
    def make(lab: Lab) -> list[object]:
        folder = _foreign_adapter(lab)
        values = json.loads((folder / "adapter_config.json").read_text()) | change
        replace(folder / "adapter_config.json", json.dumps(values))
        return command(lab, folder)

    return make


# --- options and names

OPTIONS: list[list[object]] = [
    ["chat", "RUN", "-p", "x", "--temperature", "nan"], ["chat", "RUN", "-p", "x", "--temperature", "inf"],
    ["chat", "RUN", "-p", "x", "--temperature", "-1"], ["chat", "RUN", "-p", "x", "--max-new-tokens", "0"],
    ["chat", "RUN", "-p", "x", "--max-new-tokens", "-5"], ["chat", "RUN", "-p", "x", "--top-p", "nan"],
    ["chat", "RUN", "-p", "x", "--seed", "-1"], ["chat", "RUN", "-p", "x", "--seed", "9" * 40],
    ["chat", "RUN", "-p", "x", "--dtype", "float7"], ["chat", "RUN", "-p", "x", "--lora", "nowhere.gguf"],
    ["chat", "RUN", "-p", "\udcff", "--max-new-tokens", "1"], ["chat", "RUN", "--json"],
    ["chat", "RUN", "-p", "x" * 100_000, "--max-new-tokens", "1"], ["chat", "GGUF", "-p", "x", "--n-ctx", "-1"],
    ["chat", "GGUF", "-p", "x", "--n-ctx", "0"], ["chat", "GGUF", "-p", "x", "--n-ctx", "9" * 30],
    ["chat", "GGUF", "-p", "x", "--gpu-layers", "x"], ["chat", "GGUF", "-p", "x", "--gpu-layers", "9" * 30],
    ["chat", "GGUF", "-p", "x", "--lora", "GGUF"], ["chat", "GGUF", "-p", "x", "--lora", "ROWS"],
    ["chat", "GGUF", "-p", "x" * 300_000, "--max-new-tokens", "1"], ["chat", "ROWS", "-p", "x"],
    ["chat", "GGUF", "-p", "x", "--compare", "--max-new-tokens", "1"], ["chat", "", "-p", "x"],
    ["chat", "\0", "-p", "x"], ["chat", "x" * 5000, "-p", "x"], ["chat", "a/b/c/d", "-p", "x"],
    ["chat", "~nobody/x", "-p", "x"], ["chat", "/dev/null", "-p", "x"], ["chat", "/proc/self/mem", "-p", "x"],
    ["export", "RUN", "--to", ""], ["export", "RUN", "--to", ",,"], ["export", "RUN", "--to", "gguf:"],
    ["export", "RUN", "--to", "gguf:q9_z"], ["export", "RUN", "--to", "gguf:iq2_xs"],
    ["export", "RUN", "--to", "merged", "--dtype", "int4"], ["export", "RUN", "--to", "gguf:q4_k_m", "--imatrix", "ROWS"],
    ["export", "RUN", "--to", "gguf:q4_k_m", "--imatrix", "GGUF"], ["export", "RUN", "--to", "gguf:q4_k_m", "--imatrix", "/nowhere"],
    ["export", "RUN", "--to", "merged", "--out", "ROWS"], ["export", "RUN", "--to", "merged", "--out", "/proc/x"],
    ["export", "RUN", "--to", "merged", "--out", "x\0y"], ["export", "RUN", "--to", "merged", "--out", "y" * 300],
    ["export", "RUN", "--to", "merged", "--base", "/nowhere"], ["export", "RUN", "--to", "merged", "--base", "ROWS"],
    ["export", "RUN", "--to", "merged", "--base", "RUN"], ["export", "RUN", "--quant", "nonsense", "--no-verify"],
    ["export", "RUN", "--quant", "auto", "--max-kl", "nan", "--no-verify"], ["export", "RUN", "--quant", "auto", "--max-kl", "-1", "--no-verify"],
    ["export", "BASE", "--to", "adapter"], ["export", "BASE", "--to", "merged"], ["export", "BASE", "--to", "gguf-lora"],
    ["export", "GGUF", "--to", "merged"], ["export", "ROWS", "--to", "merged"], ["export", "\0", "--to", "merged"],
    ["verify", "BASE"], ["verify", "ROWS"], ["verify", "\0"], ["verify", "RUN", "--out", "/nowhere"],
    ["verify", "RUN", "--out", "ROWS"], ["push", "RUN", "--repo", "x"], ["push", "RUN", "--repo", "a/b/c"],
    ["push", "RUN", "--repo", "\0/x"], ["push", "RUN", "--repo", "a/b", "--base-id", "ROWS"],
    ["push", "RUN", "--repo", "a/b", "--base-id", "x"], ["push", "RUN", "--repo", "a/b", "--include", "x", "--base-id", "c/d"],
    ["push", "BASE", "--repo", "a/b"], ["serve", "ROWS"], ["serve", "BASE"], ["serve", "GGUF", "--port", "0"],
    ["serve", "GGUF", "--port", "99999"], ["serve", "GGUF", "--host", "0.0.0.0"], ["serve", "GGUF", "--n-ctx", "-1"],
    ["serve", "GGUF", "--lora", "ROWS"], ["serve", "GGUF", "--gpu-layers", "x"], ["serve", "\0"],
    ["train", "CONFIG", "--set", "x"], ["train", "CONFIG", "--set", "=3"], ["train", "CONFIG", "--set", "a.b.c.d=3"],
    ["train", "CONFIG", "--set", "model=3"], ["train", "CONFIG", "--set", "lora.r=[[["], ["train", "CONFIG", "--set", "train.seed=" + "9" * 5000],
    ["train", "CONFIG", "--set", "lora..r=3"], ["train", "CONFIG", "--set", ".=3"], ["train", "CONFIG", "--set", "lora.r=&a [*a]"],
    ["train", "CONFIG", "--set", "train.learning_rate=.inf"], ["train", "CONFIG", "--set", "train.weight_decay=.nan"],
    ["train", "CONFIG", "--set", "train.max_minutes=.inf"], ["train", "CONFIG", "--set", "train.epochs=.inf"],
    ["train", "CONFIG", "--set", "train.epochs=1e300"], ["train", "CONFIG", "--set", "train.max_steps=" + "9" * 25],
    ["train", "CONFIG", "--set", "lora.r=100000000"], ["train", "CONFIG", "--set", "lora.alpha=.inf"],
    ["train", "CONFIG", "--set", "model.max_seq_length=" + "9" * 25], ["train", "CONFIG", "--set", "lora.target_modules=["],
    ["train", "CONFIG", "--set", "lora.target_modules=(a+)+$"], ["train", "CONFIG", "--set", "lora.target_modules=[]"],
    ["train", "CONFIG", "--set", "project=.."], ["train", "CONFIG", "--set", 'project="a\\0b"'],
    ["train", "CONFIG", "--set", 'output_dir="a\\0b"'], ["train", "CONFIG", "--set", "output_dir=/proc/x"],
    ["train", "CONFIG", "--set", "output_dir=/dev/null/x"], ["train", "CONFIG", "--set", 'mirror="a\\0b"'],
    ["train", "CONFIG", "--set", "mirror=/dev/null"], ["train", "CONFIG", "--stop-after", "0"],
    ["train", "CONFIG", "--stop-after", "-3"], ["train", "CONFIG", "--stop-after", "9" * 40], ["train", "BASE"],
    ["train", "/dev/null"], ["train", "\0"], ["train", "x" * 5000], ["data", "CONFIG", "--set", "data.columns={a: 3}"],
    ["data", "CONFIG", "--set", 'data.source="a\\0b"'], ["data", "CONFIG", "--set", "data.source=/dev/null"],
    ["data", "CONFIG", "--set", "data.source=/proc"], ["data", "CONFIG", "--set", "data.source=''"],
    ["data", "CONFIG", "--set", "data.source=~"], ["data", "CONFIG", "--set", "data.eval_source=/dev/null"],
    ["data", "CONFIG", "--set", "data.chat_template=ROWS"], ["data", "CONFIG", "--set", "data.chat_template=/dev/null"],
    ["plan", "CONFIG", "--gpu", ""], ["plan", "CONFIG", "--gpu", "\0"], ["plan", "CONFIG", "--plot", "/nowhere/x.png"],
    ["plan", "CONFIG", "--plot", "ROWS/x.png"], ["plan", "CONFIG", "--apply", "/nowhere/x.yaml"], ["plan", "CONFIG", "--plot", "x.nonsense"],
    ["init", "--gpu", "\0"], ["init", "--model", "\0"], ["init", "--data", "a\nb: c"], ["init", "--model", "x: y"],
    ["quickstart", "--out", "ROWS"], ["quickstart", "--out", "\0"], ["bench", "--case", "nonsense"], ["bench", "--case", "ROWS"],
    ["nonsense"], ["train"], ["--nonsense"], ["export", "RUN", "--nonsense"],
]  # fmt: skip


@group
def options(chance: random.Random) -> Iterator[Attack]:
    """Options and names that mean nothing."""
    for number, arguments in enumerate(OPTIONS):
        shown = " ".join(str(argument)[:24] for argument in arguments)
        yield Attack(f"{number}: {shown}", _option(arguments), GOOD_OR_BAD | {1, 3})


def _option(arguments: list[object]):
    def make(lab: Lab) -> list[object]:
        os.chdir(lab.room)
        names = {
            "RUN": str(lab.copy_of(lab.run)), "BASE": str(lab.base), "ROWS": str(lab.rows),
            "GGUF": str(next(lab.run.glob("export/*.F16.gguf"))), "CONFIG": str(lab.config(lab.room)),
        }  # fmt: skip
        found = []
        for argument in arguments:
            for name, value in names.items():
                if argument == name or str(argument).startswith(f"{name}/"):
                    argument = str(argument).replace(name, value, 1)
                elif str(argument).endswith(f"={name}"):
                    argument = str(argument)[: -len(name)] + value
            found.append(argument)
        return found

    return make


# --- GGUF files


@group
def ggufs(chance: random.Random) -> Iterator[Attack]:
    """GGUF files that are cut, foreign, or say something impossible in their header."""
    cuts = {f"cut at {share:.0%}": share for share in (0.0, 0.001, 0.1, 0.5, 0.99)}
    for name, share in cuts.items():
        yield Attack(name, _gguf_file(lambda b, s=share: b[: int(len(b) * s)]))
    heads = {
        "only the magic": b"GGUF", "version 99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        "nothing in it": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        "endless tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0),
        "endless keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62),
        "an endless key": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62),
        "turned": b"GGUF"[::-1],
    }  # fmt: skip
    for name, content in heads.items():
        yield Attack(name, _gguf_file(lambda b, c=content: c))
    for number, template in enumerate(TEMPLATES):
        yield Attack(f"template {number}: {template[:40]}", _gguf_template(template))


TEMPLATES = [
    "{{ nonsense", "{{ 1 / 0 }}", "{% for %}", "{{ messages[99].content }}", "{{ raise_exception('no') }}",
    "{{ messages + 3 }}", "{{ messages.x.y.z }}", "{% include 'x' %}", "{{ ''.__class__.__mro__ }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ 'a' | nonsense }}", "{{ messages | tojson | int + 'x' }}",
]  # fmt: skip
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**11 }}", "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{{ '%1000000000d' | format(1) }}", "{{ 'x'.center(10**10) }}", "{{ 10 ** 10 ** 8 }}",
]  # fmt: skip


@group
def endless(chance: random.Random) -> Iterator[Attack]:
    """Chat templates that would run for ever or fill the memory."""
    for number, template in enumerate(ENDLESS):
        yield Attack(
            f"endless {number}: {template[:40]}",
            _shape("chat_template.jinja", template, "base", _gguf),
        )


def _gguf_file(change: Callable[[bytes], bytes]):
    def make(lab: Lab) -> list[object]:
        whole = next(lab.run.glob("export/*.F16.gguf")).read_bytes()
        path = lab.room / "x.gguf"
        path.write_bytes(change(whole))
        return ["chat", path, "-p", "hi", "--max-new-tokens", 1]

    return make


def _gguf_template(template: str):
    """Write the run's model with another chat template of the same length in bytes."""

    def make(lab: Lab) -> list[object]:
        folder = lab.copy_of(lab.base)
        replace(folder / "chat_template.jinja", template)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        replace(folder / "tokenizer_config.json", json.dumps(config))
        done = attempt(["export", folder, "--to", "gguf:f16", "--out", lab.room, "--no-verify"])
        assert done.code == 0, done.text
        return ["chat", next(lab.room.glob("*.gguf")), "-p", "hi", "--max-new-tokens", 1]

    return make


# --- eval, sweep, several processes, several sources, vLLM, MLX, selftest


QUESTIONS: dict[str, object] = {
    "no rows": "", "no questions": {"a": 1}, "a number": 3, "not JSON": "{", "text": {"text": ""},
    "one choice": {"question": "q", "choices": ["a"], "answer": 0},
    "answer beyond": {"question": "q", "choices": ["a", "b"], "answer": 7},
    "answer below": {"question": "q", "choices": ["a", "b"], "answer": -1},
    "answer is a list": {"question": "q", "choices": ["a", "b"], "answer": [0]},
    "choices are a text": {"question": "q", "choices": "[1, 2", "answer": 0},
    "choices are nested": {"question": "q", "choices": [["a"], ["b"]], "answer": 0},
    "labels are a number": {"question": "q", "choices": {"text": ["a", "b"], "label": 3}, "answer": "a"},
    "more labels": {"question": "q", "choices": {"text": ["a", "b"], "label": list("xyz")}, "answer": "z"},
    "no texts": {"question": "q", "choices": {"label": ["A"]}, "answer": "A"},
    "a question of none": {"question": None, "choices": ["a", "b"], "answer": 0},
    "a question of lists": {"question": [["x"]], "choices": ["a", "b"], "answer": 0},
    "messages of numbers": {"messages": [1, 2], "choices": ["a", "b"], "answer": 0},
    "answers empty": {"question": "q", "answers": []}, "answers nested": {"question": "q", "answers": {"a": 1}},
    "a broken pattern": {"question": "q", "pattern": "(["}, "a pattern of none": {"question": "q", "pattern": {}},
    "an endless pattern": {"question": "q", "pattern": r"^(\S+\s?)+\s{99}$"},
    "a control token": {"question": "<|im_end|>", "answer": "<|im_start|>"},
    "a surrogate": '{"question": "\\ud800", "answer": "x"}', "a huge question": {"question": "x " * 200_000, "answer": "y"},
}  # fmt: skip
EVALS: list[list[object]] = [
    ["eval", "RUN"], ["eval", "RUN", "--data", "/nowhere.jsonl"], ["eval", "RUN", "--data", "ROWS", "--metric", "x"],
    ["eval", "RUN", "--data", "ROWS", "--metric", "choice"], ["eval", "RUN", "--data", "ROWS", "--limit", "0"],
    ["eval", "RUN", "--data", "ROWS", "--max-new-tokens", "0"], ["eval", "RUN", "--data", "ROWS", "--max-new-tokens", "-5"],
    ["eval", "RUN", "--data", "ROWS", "--at-least", "exact_match=x"], ["eval", "RUN", "--data", "ROWS", "--at-least", "exact_match=nan"],
    ["eval", "RUN", "--data", "ROWS", "--at-least", "=1"], ["eval", "RUN", "--data", "ROWS", "--against", "/nowhere"],
    ["eval", "RUN", "--data", "ROWS", "--out", "ROWS"], ["eval", "RUN", "--data", "ROWS", "--limit", "9" * 30, "--dtype", "float7"],
    ["eval", "GGUF", "--data", "ROWS", "--n-ctx", "-1"], ["eval", "RUN", "--data", "ROWS", "--tasks", "x"],
    ["eval", "RUN", "--tasks", "nonsense"], ["eval", "ROWS", "--data", "ROWS"], ["eval", "\0", "--data", "ROWS"],
]  # fmt: skip
SWEEPS = [
    "", "=", "lora.r", "lora.r=", "lora.r=,", "x=1,2", "lora.r=0,x", "lora.r=.nan,.inf", "project=a,b",
    "train.learning_rate=1e-5..1e-3", "train.learning_rate=1e-5..1e999", "train.learning_rate=nan..inf",
    "train.learning_rate=-1..1", "lora.r=8..4", "train.seed=" + ",".join(map(str, range(2000))),
    "lora.target_modules=" + "x" * 400 + ",q_proj",
]  # fmt: skip
SOURCES: list[object] = [
    3, "x", [], [[]], [{}], [{"source": 3}], [{"source": "ROWS", "weight": 0}], [{"source": "ROWS", "weight": -1}],
    [{"source": "ROWS", "weight": float("nan")}] * 2, [{"source": "ROWS", "weight": float("inf")}] * 2,
    [{"source": "ROWS", "weight": 1e308}] * 3, [{"source": "ROWS", "weight": 1}, {"source": "ROWS"}],
    [{"source": "ROWS", "weight": 1e-320}, {"source": "ROWS", "weight": 1e300}], [{"source": "/nowhere.jsonl"}],
    [{"source": "ROWS", "columns": {"a": 3}}], [{"source": "ROWS", "eval_fraction": 1.5}],
    [{"source": "ROWS", "nonsense": 1}], [{"source": "ROWS", "format": "x"}],
]  # fmt: skip
OTHERS: list[list[object]] = [
    ["sweep", "CONFIG", "--vary", "lora.r=2,4", "--trials", "0"],
    ["sweep", "CONFIG", "--vary", "lora.r=1..9", "--trials", "9" * 12], ["sweep", "CONFIG", "--vary", "lora.r=2,4", "--keep", "x"],
    ["sweep", "CONFIG", "--vary", "lora.r=2,4", "--ray", "--processes", "2"], ["sweep", "CONFIG", "--vary", "lora.r=2", "--vary", "lora.r=4"],
    ["sweep", "CONFIG", "--vary", "lora.target_modules=[q_proj],q_proj"],
    ["train", "CONFIG", "--processes", "0"], ["train", "CONFIG", "--processes", "-2"], ["train", "CONFIG", "--processes", "999999"],
    ["sweep", "CONFIG", "--vary", "lora.r=2,4", "--processes", "999999"], ["train", "CONFIG", "--set", "train.shard_base=true"],
    ["serve", "RUN", "--with", "x"], ["serve", "ROWS", "--with", "vllm", "--print"], ["serve", "GGUF", "--with", "vllm", "--print"],
    ["serve", "RUN", "--with", "vllm", "--print", "--adapter", "x"], ["serve", "RUN", "--with", "vllm", "--print", "--adapter", "x="],
    ["serve", "RUN", "--with", "vllm", "--print", "--adapter", "x=/nowhere"], ["serve", "RUN", "--with", "vllm", "--print", "--adapter", "x=ROWS"],
    ["serve", "RUN", "--with", "vllm", "--print", "--host", "0.0.0.0"], ["serve", "RUN", "--print"], ["serve", "GGUF", "--adapter", "x=RUN"],
    ["train", "CONFIG", "--set", "model.engine=mlx"], ["train", "CONFIG", "--set", "model.engine=mlx", "--set", "lora.use_dora=true"],
    ["train", "CONFIG", "--set", "model.engine=mlx", "--set", "model.quantization=int8"], ["quickstart", "--engine", "x"],
    ["selftest", "--minutes", "nan"], ["selftest", "--minutes", "inf"], ["selftest", "--minutes", "-1"], ["selftest", "--minutes", "0"],
    ["selftest", "--minutes", "0.001", "--out", "ROWS"], ["selftest", "--minutes", "0.001", "--out", "\0"], ["runs", "ROWS"], ["runs", "\0"],
    ["train", "CONFIG", "--set", r"lora.target_modules=([a-z_.0-9]+)+X"], ["plan", "CONFIG", "--gpus", "0"], ["plan", "CONFIG", "--gpus", "9" * 20],
]  # fmt: skip
VLLM = [
    {"r": None}, {"r": "x"}, {"r": 10**9}, {"r": -1}, {"rank_pattern": 3}, {"rank_pattern": {"q": "x"}},
    {"use_dora": True}, {"modules_to_save": ["x"]}, {"trainable_token_indices": 3}, {"rank_pattern": {"([a-z_.0-9]+)+X": 3}},
]  # fmt: skip
SWEEP_FILES = ["", "{", "[]", '{"trials": 3}', '{"trials": [{}]}', '{"trials": [3]}', "\0"]


@group
def newest(chance: random.Random) -> Iterator[Attack]:
    """The youngest verbs and sections: questions, sweeps, sources, processes, servers, self-test."""
    for name, row in QUESTIONS.items():
        yield Attack(f"question: {name}", _questions(row), GOOD_OR_BAD)
    for arguments in [*EVALS, *OTHERS]:
        shown = " ".join(str(argument)[:24] for argument in arguments)
        yield Attack(shown, _option(arguments), GOOD_OR_BAD | {1, 3})
    for text in SWEEPS:
        arguments = ["sweep", "CONFIG", "--vary", text]
        drawn = ["--trials", 1] if ".." in text and "e-3" not in text else []
        yield Attack(f"sweep {text[:40]}", _option([*arguments, *drawn]))
    for content in SWEEP_FILES:
        yield Attack(f"sweep.json = {content!r}", _sweep_file(content), GOOD_OR_BAD)
    for sources in SOURCES:
        yield Attack(f"data.sources = {str(sources)[:50]}", _sources(sources), GOOD_OR_BAD)
    for change in VLLM:
        yield Attack(f"vllm {json.dumps(change)[:40]}", _adapter_config(change, _vllm), GOOD_OR_BAD)


def _questions(row: object):
    def make(lab: Lab) -> list[object]:
        path = lab.room / "q.jsonl"
        path.write_text(row if isinstance(row, str) else json.dumps(row))
        arguments = ["--max-new-tokens", 4, "--no-base", "--no-exports", "--out", lab.room / "e"]
        return ["eval", lab.copy_of(lab.run), "--data", path, *arguments]

    return make


def _sweep_file(content: str):
    def make(lab: Lab) -> list[object]:
        folder = lab.room / "runs" / "t-sweep"
        folder.mkdir(parents=True)
        (folder / "sweep.json").write_text(content)
        config = lab.config(lab.room, train={"max_steps": 1})
        return ["sweep", config, "--vary", "lora.r=2"]

    return make


def _sources(sources: object):
    def make(lab: Lab) -> list[object]:
        path = lab.config(lab.room)
        values = yaml.safe_load(path.read_text().replace(f"source: {lab.rows}\n", ""))
        values["data"]["sources"] = json.loads(json.dumps(sources).replace("ROWS", str(lab.rows)))
        path.write_text(yaml.safe_dump(values))
        return ["data", path]

    return make


def _vllm(lab: Lab, folder: Path) -> list[object]:
    return ["serve", folder, "--with", "vllm", "--print"]


# --- running them


def survey(lab: Lab, chosen: list[Attack]) -> list[str]:
    """Make each attack; return a line for each that did not end as promised."""
    found = []
    for attack in chosen:
        before = os.getcwd()
        lab.new_room()
        try:
            outcome = attempt(attack.make(lab))
        finally:
            os.chdir(before)
        problem = outcome.problem(set(attack.codes), LIMIT_SECONDS)
        if problem:
            found.append(f"{attack.name}: {problem}: {outcome.text.strip()[-300:]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", choices=GROUPS, action="append")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the lab there, for the next call")
    parser.add_argument("--name", help="only attacks whose name holds this text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(arguments.folder or Path(folder))
        counts, bad = Counter(), Counter()
        for name in arguments.group or GROUPS:
            chosen = list(GROUPS[name](random.Random(f"{arguments.seed}-{name}")))
            chosen = [a for a in chosen if (arguments.name or "") in a.name][:: arguments.every]
            for attack in chosen:
                counts[name] += 1
                for line in survey(lab, [attack]):
                    bad[name] += 1
                    print(f"[{name}] {line}", flush=True)
            print(f"[{name}] {counts[name]} attacks, {bad[name]} not as promised", flush=True)
        print(f"{sum(counts.values())} attacks, {sum(bad.values())} not as promised")
        sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
