"""What a run lives through: another machine, an emptied disk, another base in the same place, a record that is gone, NaN."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

from fastft import cli
from fastft.runs import checkpoint
from tests.e2e.conftest import losses


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def change(config, **values):
    """Rewrite the config file with other values; `section__key=value`."""
    read = yaml.safe_load(config.read_text())
    for key, value in values.items():
        *section, name = key.split("__")
        (read[section[0]] if section else read)[name] = value
    config.write_text(yaml.safe_dump(read))
    return config


@pytest.fixture(scope="module")
def half(tmp_path_factory, checkpoint_of, rows_file):
    """(config, losses of 12 undisturbed steps); the run and its mirror have stopped after step 6."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "drive").mkdir()
    shutil.copytree(checkpoint_of("llama"), folder / "base")
    shutil.copy(rows_file, folder / "rows.jsonl")
    config = folder / "run.yaml"
    values = {
        "project": "t",
        "output_dir": str(folder / "undisturbed"),
        "model": {
            "name": str(folder / "base"),
            "max_seq_length": 128,
            "engine": "stock",
            "dtype": "float32",
        },
        "data": {"source": str(folder / "rows.jsonl")},
        "lora": {"dropout": 0.1},
        "train": {"max_steps": 12, "save_steps": 2, "eval_steps": 5, "learning_rate": 3e-3},
    }
    config.write_text(yaml.safe_dump(values))
    with threads(1):
        assert cli.run(["train", str(config)]) == 0
        trace = losses(folder / "undisturbed" / "t")
        change(config, output_dir=str(folder / "runs"), mirror=str(folder / "drive"))
        assert cli.run(["train", str(config), "--stop-after", "6"]) == 0
    return config, trace


@pytest.fixture
def moved(half, tmp_path):
    """The half-done run on another machine: everything lies elsewhere; returns (config, run, mirror, losses)."""
    config, trace = half
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(config.parent, elsewhere)
    text = (elsewhere / "run.yaml").read_text().replace(str(config.parent), str(elsewhere))
    (elsewhere / "run.yaml").write_text(text)
    return elsewhere / "run.yaml", elsewhere / "runs" / "t", elsewhere / "drive" / "t", trace


def test_another_machine_goes_on_from_the_mirror(moved, attempt):
    """Empty disk, other paths, other thread count: the same data in the same order, losses to 1e-4, said in run.json."""
    config, run, mirror, trace = moved
    shutil.rmtree(run.parent)
    with threads(2):
        code, message = attempt("train", config)
    assert code == 0, message
    assert "its checkpoint of step 6 was verified and copied here" in message
    assert "resuming after step 6" in message
    assert losses(run) == pytest.approx(trace, abs=1e-4)
    assert {step: loss for step, loss in losses(run).items() if step <= 6} == {
        s: trace[s] for s in range(1, 7)
    }
    (resumed,) = json.loads((run / "run.json").read_text())["resumed"]
    assert resumed["after_step"] == 6
    assert resumed["machine"]["threads"] == 2
    assert any(line.startswith("model.name was") for line in resumed["paths"])
    assert (mirror / "final" / "adapter_model.safetensors").read_bytes() == (
        run / "final" / "adapter_model.safetensors"
    ).read_bytes()
    assert json.loads((run / "run.json").read_text())["mirror"]["verified_steps"][-1] == 12


def test_another_base_in_the_same_place_is_refused(moved, attempt):
    config, run, _, _ = moved
    weights = config.parent / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    code, message = attempt("train", config)
    assert code == 2
    assert "is not the one that the run in" in message
    assert "model.safetensors was" in message
    assert not (run / "final").exists()


def test_export_and_chat_refuse_another_base_and_a_changed_adapter(moved, attempt, tmp_path):
    config, run, _, _ = moved
    code, message = attempt("train", change(config, mirror=None, train__max_steps=7))
    assert code == 0, message
    adapter = run / "final" / "adapter_model.safetensors"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, message = attempt("export", run, "--to", "merged", "--no-verify")
    assert code == 2
    assert "was changed after training" in message
    adapter.write_bytes(whole)
    weights = config.parent / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    for target in (run, run / "final"):
        code, message = attempt("export", target, "--to", "merged", "--no-verify")
        assert code == 2
        assert "is not the one that" in message
    code, message = attempt(
        "export", run, "--to", "merged", "--no-verify", "--base", config.parent / "base"
    )
    assert code == 0, message


@pytest.mark.parametrize("content", ["{}", "", "[1]", '{"started": ', None])
def test_a_damaged_record_is_mended_from_the_checkpoint_or_refused(content, moved, attempt):
    config, run, _, trace = moved
    change(config, mirror=None)
    record = run / "run.json"
    record.unlink() if content is None else record.write_text(content)
    bare = run.parent / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "checkpoints")
    code, message = attempt("train", config, "--set", "project=bare")
    assert code == 2
    assert "holds a run, but run.json is" in message
    assert losses(bare)  # nothing of it was overwritten
    code, message = attempt("train", config, "--stop-after", "1")
    assert code == 0, message
    assert "it was taken from checkpoint-6" in message
    assert losses(run)[7] == trace[7]


def test_a_time_limit_and_a_signal_leave_the_mirror_up_to_date(moved, attempt):
    config, run, mirror, trace = moved
    code, message = attempt("train", config, "--set", "train.max_minutes=0.001")
    assert code == 0, message
    assert "train.max_minutes 0.001: saving" in message
    assert "saving a checkpoint takes" in message
    assert losses(run) == {step: trace[step] for step in range(1, 8)}
    assert checkpoint.newest_whole(mirror / "checkpoints")[0].name == "checkpoint-7"

    def terminate():
        while 9 not in losses(run):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    code, message = attempt(
        "train", change(config, train__max_steps=1000, train__save_steps=500, train__eval_steps=500)
    )
    assert code == 130, message
    assert "state saved. The same command goes on." in message
    last = max(losses(run))
    assert 9 <= last < 1000
    newest, _ = checkpoint.newest_whole(mirror / "checkpoints")
    assert newest.name == f"checkpoint-{last}"
    assert json.loads((run / "run.json").read_text())["mirror"]["behind_because"] is None


def test_a_log_that_lost_its_end_comes_back(moved, attempt):
    config, run, _, trace = moved
    log = run / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:3]))
    code, message = attempt("train", change(config, mirror=None), "--stop-after", "1")
    assert code == 0, message
    assert "log.jsonl ends before step 6" in message
    assert losses(run) == {step: trace[step] for step in range(1, 8)}


def test_a_step_whose_loss_is_not_a_number_leaves_nothing(moved, attempt, tmp_path):
    """One token's embedding is infinite: the steps before it are kept, the step that meets it is not."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    config, _, _, _ = moved
    base = config.parent / "base"
    weights = load_file(base / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(base)("~", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    lines = (config.parent / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    bad = json.loads(lines[3])
    bad["messages"][0]["content"] += " ~"
    (config.parent / "rows.jsonl").write_text(
        "\n".join([*lines[:3], json.dumps(bad), *lines[4:]]), encoding="utf-8"
    )
    change(
        config,
        project="nan",
        mirror=None,
        data__eval_fraction=0.0,
        train__save_steps=1,
        train__max_steps=13,
    )
    code, message = attempt("train", config)
    assert code == 3, message
    assert "nothing of this step was kept" in message
    run = config.parent / "runs" / "nan"
    trace = losses(run)
    last = max(trace, default=0)
    assert 1 <= last < 13, "the bad row came first; take another one"
    assert f"the loss is nan at step {last + 1}" in message
    newest, warnings = checkpoint.newest_whole(run / "checkpoints")
    assert (newest.name, warnings) == (f"checkpoint-{last}", [])
    adapter = load_file(newest / "adapter_model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in adapter.values())
    assert not (run / "final").exists()
    code, _ = attempt("train", config)
    assert code == 3
    assert losses(run) == trace


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    from fastft.errors import CouldNotFinishError
    from fastft.training.callbacks import refuse_what_is_not_finite

    layer = torch.nn.Linear(2, 2)
    refuse_what_is_not_finite(layer, 4)  # no gradient yet
    layer(torch.ones(1, 2)).sum().backward()
    refuse_what_is_not_finite(layer, 4)
    layer.weight.grad[0, 0] = float("inf")
    with pytest.raises(CouldNotFinishError, match="gradient is not finite at step 5"):
        refuse_what_is_not_finite(layer, 5)


def test_the_lock_names_its_holder_and_ends_with_it(tmp_path):
    code = (
        "import sys, time, pathlib; from fastft.runs import checkpoint\n"
        "with checkpoint.hold(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    says = rf"is being trained by process {process.pid} on {os.uname().nodename} since 20\d\d-"
    with pytest.raises(checkpoint.FastFTError, match=says), checkpoint.hold(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert f"process {process.pid}" in (tmp_path / ".lock").read_text()  # stale
    with checkpoint.hold(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
