"""Bad input gets one clear message, exit code 2, no traceback, and leaves nothing half-written."""

import json
import os
import shutil

import pytest

from fastft import cli


def rows(path, lines):
    path.write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    return path


def turn(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


# name: (changes of the config given (tmp_path, base), what the message must say)
CONFIGS = {
    "unknown key": (lambda t, b: {"lora": {"rank": 8}}, "unknown key lora.rank"),
    "wrong section": (lambda t, b: {"learning_rate": 1}, "train.learning_rate"),
    "wrong type": (lambda t, b: {"train": {"epochs": "two"}}, "train.epochs"),
    "negative rank": (lambda t, b: {"lora": {"r": -1}}, "lora.r"),
    "dropout above 1": (lambda t, b: {"lora": {"dropout": 1.5}}, "lora.dropout"),
    "not a number": (
        lambda t, b: {"train": {"learning_rate": float("nan")}},
        "train.learning_rate",
    ),
    "unknown export": (lambda t, b: {"export": {"to": ["guff"]}}, "unknown export target"),
    "quantised float32": (
        lambda t, b: {"model": {"quantization": "nf4"}},
        "quantised weights compute in 16 bit",
    ),
    "pissa on nf4": (
        lambda t, b: {"model": {"quantization": "nf4", "dtype": "auto"}, "lora": {"init": "pissa"}},
        "changes the base weights",
    ),
    "missing data": (lambda t, b: {"data": {"source": str(t / "nowhere.jsonl")}}, "nowhere.jsonl"),
    "empty data": (lambda t, b: {"data": {"source": str(rows(t / "empty.jsonl", []))}}, "empty"),
    "binary data": (lambda t, b: {"data": {"source": _binary(t / "x.jsonl")}}, "x.jsonl"),
    "no known column": (
        lambda t, b: {"data": {"source": str(rows(t / "f.jsonl", [{"foo": 1, "bar": 2}]))}},
        "foo",
    ),
    "all answers empty": (
        lambda t, b: {"data": {"source": str(rows(t / "m.jsonl", [turn("hello", "")] * 5))}},
        "m.jsonl",
    ),
    "questions fill the length": (
        lambda t, b: {
            "model": {"max_seq_length": 16},
            "data": {"source": str(rows(t / "l.jsonl", [turn("long " * 200, "short")] * 5))},
        },
        "max_seq_length",
    ),
    "unknown template": (
        lambda t, b: {"data": {"chat_template": "chatlm"}},
        "did you mean 'chatml'",
    ),
    "template file missing": (
        lambda t, b: {"data": {"chat_template": "my/t.jinja"}},
        "does not exist",
    ),
    "no such model folder": (
        lambda t, b: {"model": {"name": str(t / "models" / "nothing")}},
        "does not exist",
    ),
    "no such hub model": (
        lambda t, b: {"model": {"name": "nobody/no-such-model"}},
        "nobody/no-such-model",
    ),
    "model is a file": (
        lambda t, b: {"model": {"name": str(_file(t / "model.gguf"))}},
        "is a file",
    ),
    "folder is no model": (lambda t, b: {"model": {"name": str(t)}}, "no config.json"),
    "pickle only": (
        lambda t, b: {"model": {"name": str(_pickle_only(t, b))}},
        "only pickle weights (pytorch_model.bin)",
    ),
    "config without weights": (
        lambda t, b: {"model": {"name": str(_no_weights(t, b))}},
        "no *.safetensors",
    ),
    "config.json damaged": (
        lambda t, b: {"model": {"name": str(_damaged_config(t, b))}},
        "not valid JSON",
    ),
    "weights truncated": (
        lambda t, b: {"model": {"name": str(_truncated(t, b))}},
        "model.safetensors",
    ),
    "targets match nothing": (lambda t, b: {"lora": {"target_modules": ["qproj"]}}, "q_proj"),
    "unknown token to train": (lambda t, b: {"lora": {"train_tokens": ["<|nope|>"]}}, "<|nope|>"),
    "output is a file": (lambda t, b: {"output_dir": str(_file(t / "taken"))}, "taken"),
    "float16 on a cpu": (lambda t, b: {"model": {"dtype": "float16"}}, "float16"),
    "mirror not mounted": (
        lambda t, b: {"mirror": str(t / "drive" / "fastft")},
        "is the drive still mounted",
    ),
    "tracker not installed": (
        lambda t, b: {"train": {"report_to": ["wandb"]}},
        "wandb is not installed",
    ),
    "endless project name": (lambda t, b: {"project": "x" * 300}, "300 bytes long"),
    "pissa with token rows": (
        lambda t, b: {"lora": {"init": "pissa", "train_tokens": ["<|im_end|>"]}},
        "cannot be combined with trained token rows",
    ),
    "project with a slash": (lambda t, b: {"project": "a/b"}, "not a folder name"),
}


def _file(path):
    path.write_text("x")
    return path


def _binary(path):
    path.write_bytes(bytes(range(256)) * 40)
    return str(path)


def _copy(tmp_path, base):
    folder = tmp_path / "copy"
    shutil.copytree(base, folder)
    return folder


def _pickle_only(tmp_path, base):
    folder = _copy(tmp_path, base)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def _no_weights(tmp_path, base):
    folder = _copy(tmp_path, base)
    (folder / "model.safetensors").unlink()
    return folder


def _damaged_config(tmp_path, base):
    folder = _copy(tmp_path, base)
    (folder / "config.json").write_text('{"model_type": "qwen3", ')
    return folder


def _truncated(tmp_path, base):
    folder = _copy(tmp_path, base)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_or_input_of_train(name, attempt, write_config, checkpoint_of, tmp_path):
    change, says = CONFIGS[name]
    base = checkpoint_of("qwen3")
    code, message = attempt("train", write_config(base, **change(tmp_path, base)))
    assert code == 2, message
    assert "error: " in message
    assert says in message
    runs = tmp_path / "runs" / "t"
    assert not (runs / "final").exists()
    assert not list(runs.glob("checkpoints/*"))


def test_several_faults_are_one_message(attempt, write_config, checkpoint_of):
    code, message = attempt(
        "train", write_config(checkpoint_of("qwen3"), lora={"rr": 1}, train={"epochs": -1})
    )
    assert code == 2
    assert "2 problems" in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "missing.yaml"], "missing.yaml does not exist"),
        (["train"], "Missing argument"),
        (["trian", "x.yaml"], "No such command"),
        (["train", "x.yaml", "--stop-after", "many"], "valid integer"),
        (["export", "nowhere-at-all/run", "--to", "gguf_q4"], "unknown export target"),
        (["export", "./nowhere/run"], "does not exist"),
        (["verify", "./nowhere/run"], "does not exist"),
        (["chat", "./nowhere.gguf", "-p", "x"], "does not exist"),
        (["chat", "./nowhere/run", "-p", "x"], "does not exist"),
        (["chat", "./nowhere/run", "-p", "x", "--top-p", "2"], "--top-p is 2"),
        (["plan"], "give a config"),
        (["init", "--gpu", "t5"], "unknown GPU 't5'"),
    ],
)
def test_bad_commands(arguments, says, attempt):
    code, message = attempt(*arguments)
    assert code == 2, message
    assert says in message


@pytest.mark.parametrize(
    "text", ["", "- a\n- b", "project: a\nproject: b", "model: {name: x", "model:\n\tname: x"]
)
def test_config_files_that_are_no_config(text, attempt, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, message = attempt("train", path)
    assert code == 2, message
    assert "run.yaml" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_write_permission(attempt, write_config, checkpoint_of, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code, message = attempt("train", write_config(checkpoint_of("qwen3"), output_dir=str(locked)))
    assert code == 2
    assert "permission denied" in message


def test_a_full_disk_keeps_the_last_checkpoint_whole(
    attempt, write_config, checkpoint_of, tmp_path, monkeypatch
):
    """The disk fills while the second checkpoint is written: exit 3, the first is whole, and the run goes on later."""
    from fastft.runs import checkpoint

    config = write_config(checkpoint_of("qwen3"))
    real, calls = checkpoint.write_atomically, []

    def full(path, text):
        if path.name == checkpoint.MANIFEST and path.parent.name.startswith("checkpoint"):
            calls.append(path)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        return real(path, text)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    code, message = attempt("train", config)
    assert code == 3, message
    assert "No space left on device" in message
    assert "MiB free" in message
    folder = tmp_path / "runs" / "t" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["checkpoint-4"]
    assert checkpoint.what_is_wrong(folder / "checkpoint-4") is None
    monkeypatch.undo()
    code, message = attempt("train", config)
    assert code == 0, message
    assert "resuming after step 4" in message


def test_json_errors_keep_standard_output_empty(write_config, checkpoint_of, capfd):
    code = cli.run(["train", str(write_config(checkpoint_of("qwen3"), lora={"rr": 1})), "--json"])
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert "lora.rr" in err


def test_a_yaml_with_secrets_is_not_written_down(attempt, write_config, checkpoint_of, tmp_path):
    secret = "hf_" + "q" * 34
    config = write_config(checkpoint_of("qwen3"), data={"name": secret}, train={"max_steps": 1})
    attempt("train", config)
    written = [
        p.read_text()
        for p in (tmp_path / "runs").rglob("*")
        if p.suffix in {".yaml", ".json", ".md", ".jsonl"}
    ]
    assert written
    assert not any(secret in text for text in written)
    assert secret in config.read_text()
