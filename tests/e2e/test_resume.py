"""Killed at any step and started again, a float32 run has the loss trace of the run that never stopped."""

import json
import os
import shutil
import signal

import pytest

from tests.e2e.conftest import fastft, losses, start, wait_for_step


def test_kill_slice_and_terminate_leave_the_same_trace(fresh):
    config, run, trace = fresh
    process = start(config)
    wait_for_step(run, 6, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sliced = fastft("train", config, "--stop-after", 3, "--json")
    assert (sliced.code, sliced.json["status"]) == (0, "paused"), sliced.err
    process = start(config)
    wait_for_step(run, 13, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    last = fastft("train", config)
    assert last.code == 0, last.err
    assert losses(run) == pytest.approx(trace, abs=1e-6)
    again = fastft("train", config)
    assert again.code == 0
    assert "this run is finished" in again.err


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(fresh, uninterrupted, attempt):
    config, run, trace = fresh
    shutil.copytree(uninterrupted[1], run)
    shutil.rmtree(run / "final")
    newest = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    optimizer = newest / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    code, said = attempt("train", config)
    assert code == 0, said
    assert f"{newest.name} is damaged (optimizer.pt has" in said
    assert losses(run) == pytest.approx(trace, abs=1e-6)


def test_what_may_not_change_is_refused_with_the_differences(fresh, uninterrupted, attempt):
    config, run, _ = fresh
    shutil.copytree(uninterrupted[1], run)
    code, said = attempt("train", config, "--set", "lora.r=8", "--set", "train.seed=1")
    assert code == 2
    assert "lora.r was 16, is now 8" in said
    assert "train.seed was 3407, is now 1" in said


def test_more_steps_may_be_asked_for(fresh, uninterrupted, attempt):
    config, run, trace = fresh
    shutil.copytree(uninterrupted[1], run)
    code, said = attempt("train", config, "--set", "train.max_steps=26", "--json")
    assert code == 0, said
    longer = losses(run)
    assert len(longer) == 26
    assert {step: longer[step] for step in trace} == trace


def test_a_second_process_on_the_same_run_is_refused(fresh, attempt):
    config, run, _ = fresh
    process = start(config)
    wait_for_step(run, 1, process)
    code, said = attempt("train", config)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert code == 2
    assert f"is being trained by process {process.pid}" in said


@pytest.mark.long
def test_a_damaged_final_is_written_again_and_a_run_is_found_from_anywhere(
    fresh, uninterrupted, tmp_path, monkeypatch
):
    config, run, _ = fresh
    shutil.copytree(uninterrupted[1], run)
    weights = run / "final" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    refused = fastft("chat", run, "--prompt", "x", "--json")
    assert refused.code == 2
    assert "cut off" in refused.err
    outcome = fastft("train", config, "--json")
    assert outcome.code == 0, outcome.err
    assert "final/ is damaged" in outcome.err.replace("\n", " ")
    assert weights.read_bytes() == whole
    monkeypatch.chdir(tmp_path)
    said = fastft("chat", "runs/t", "--prompt", "What is 3?", "--max-new-tokens", 3, "--json")
    assert said.code == 0, said.err


@pytest.mark.long
def test_a_run_that_stopped_early_is_finished(write_config, checkpoint_of, tmp_path):
    train = {
        "max_steps": 20,
        "save_steps": 1,
        "eval_steps": 1,
        "early_stopping_patience": 1,
        "learning_rate": 0.5,
    }
    config = write_config(checkpoint_of("qwen3"), train=train)
    first = fastft("train", config, "--json")
    assert first.code == 0, first.err
    assert "stopping early" in first.err
    again = fastft("train", config, "--json")
    assert "this run is finished" in again.err
    assert again.json["steps"] == first.json["steps"] < 20


@pytest.mark.long
def test_a_draw_of_the_held_out_samples_is_the_same_after_a_resume(checkpoint_of, write_config):
    def held_out_losses(run):
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}

    train = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "max_eval_samples": 7}
    config = write_config(checkpoint_of("llama"), data={"eval_fraction": 0.3}, train=train)
    whole = fastft("train", config, "--set", "project=whole")
    assert whole.code == 0, whole.err
    assert "the held-out loss is that of 7 of" in whole.err + whole.out
    assert fastft("train", config, "--stop-after", "2").code == 0
    assert fastft("train", config).code == 0
    runs = config.parent / "runs"
    assert sorted(held_out_losses(runs / "t")) == [2, 4]
    assert held_out_losses(runs / "t") == pytest.approx(held_out_losses(runs / "whole"), abs=1e-6)
    every = fastft(
        "train", config, "--set", "project=every", "--set", "train.max_eval_samples=null"
    )
    assert "held-out loss is that of" not in every.err + every.out
    assert held_out_losses(runs / "every") != pytest.approx(
        held_out_losses(runs / "whole"), abs=1e-3
    )
