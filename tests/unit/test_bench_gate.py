"""What the gate lets through, what a worker inherits, and what a made-up model is: no training here."""

from __future__ import annotations

import builtins
import dataclasses
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import fastft
from fastft import cli
from fastft.bench import command, runner, session, side_by_side, worker, workload
from fastft.bench.arms import FastftArm, PeftArm, UnslothArm
from fastft.bench.case import Tolerances, load_case
from fastft.bench.exporting import run_export
from fastft.bench.generating import run_generate
from fastft.bench.parity import Evidence, judge, judge_across
from fastft.bench.record import Check, Parity, Record, Result, Step
from fastft.bench.statistics import memory_bytes
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.quickstart import base_path
from fastft.training.session import Loop


def a_run(
    folder: Path,
    name: str,
    *,
    change: float = 0.2,
    norm: float = 1.0,
    loss: float = 4.0,
    tokens: int = 100,
    **values,
) -> Evidence:
    steps = [
        Step(seconds=1.0, loss=loss, grad_norm=norm, tokens=tokens, padded_tokens=tokens)
        for _ in range(3)
    ]
    fields = {
        "table": "defaults",
        "arm": name,
        "repeat": 0,
        "order": 0,
        "status": "ok",
        "steps": steps,
    }
    record = Record.model_validate(
        fields | {"trainable_parameters": 8, "adapter_change": change} | values
    )
    gradient = folder / f"{name}.safetensors"
    save_file({"lora_A": np.ones((2, 4), np.float32)}, gradient)
    return Evidence(record, gradient)


STEPS = [[(60, 0), (40, 0)]] * 3  # what `a_run` saw: three steps of 100 tokens


def failed(gate: Parity) -> set[str]:
    return {check.name for check in gate.checks if not check.passed}


# --- the gate


def test_an_optimizer_that_does_nothing_or_twice_too_much_is_caught(tmp_path):
    reference = a_run(tmp_path, "reference")
    assert judge(a_run(tmp_path, "fine", change=0.18), reference, STEPS, Tolerances()).passed
    for change in (0.0, 0.09, 0.41, float("nan")):
        gate = judge(a_run(tmp_path, "wrong", change=change), reference, STEPS, Tolerances())
        assert failed(gate) == {"adapter change"}, change


def test_only_an_arm_that_shares_beginnings_may_compute_fewer_tokens(tmp_path):
    reference, shared = a_run(tmp_path, "reference"), [[(90, 0), (80, 60)]] * 3
    says = {"share_prefixes": "True (exact for llama)"}
    assert not failed(
        judge(a_run(tmp_path, "a", patches=says), reference, [[(100, 0)]] * 3, Tolerances())
    )
    for seen, allowed in ((109, False), (110, True), (170, True), (171, False)):
        run = a_run(tmp_path, "b", patches=says, tokens=seen)
        assert failed(judge(run, reference, shared, Tolerances())) == (
            set() if allowed else {"tokens seen"}
        )
    quiet = a_run(tmp_path, "c", tokens=110)
    assert failed(judge(quiet, reference, shared, Tolerances())) == {"tokens seen"}


def test_at_full_size_the_parameters_the_norms_and_the_change_are_looked_at_too(tmp_path):
    small = Parity(
        passed=True, checks=[Check(name="step-1 loss", passed=True, value=1.0, text="few layers")]
    )
    peft = a_run(tmp_path, "peft").record

    def gate(**values):
        return judge_across(a_run(tmp_path, "fastft", **values).record, peft, small, STEPS, 8, 0.01)

    assert gate().passed
    assert failed(gate(trainable_parameters=4)) == {"trainable parameters at full size"}
    assert failed(gate(norm=0.0)) == {"gradient norms"}
    assert failed(gate(change=0.0)) == {"adapter change"}
    assert failed(gate(loss=5.0)) == {"step-1 loss at full size against peft"}
    alone = judge_across(a_run(tmp_path, "fastft").record, None, small, STEPS, 8, 0.01)
    assert alone.passed
    assert any("no other arm lived" in check.text for check in alone.checks)


def test_where_peft_dies_at_full_size_an_arm_is_not_compared_with_itself(tmp_path):
    case = load_case("cpu-135m")
    state = runner._Invocation(
        case, runner.describe_machine(case, runner.probe()), tmp_path, print, 0
    )
    for name, status in {"peft": "oom", "unsloth": "ok", "fastft": "ok"}.items():
        state.evidence["defaults", name, 0] = a_run(tmp_path, name, status=status)
    found = {
        arm: runner._baseline_at_full_size(state, "defaults", arm) for arm in ("unsloth", "fastft")
    }
    assert {arm: record and record.arm for arm, record in found.items()} == {
        "unsloth": "fastft",
        "fastft": "unsloth",
    }
    state.evidence["defaults", "peft", 0] = a_run(tmp_path, "peft")
    assert all(
        runner._baseline_at_full_size(state, "defaults", arm).arm == "peft"
        for arm in ("peft", "fastft")
    )


# --- what is alike for all


def test_a_worker_gets_nothing_that_tunes_it_but_from_its_case(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as fastft's own command line does
    monkeypatch.setenv("MALLOC_TOP_PAD_", "268435456")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    found = runner._environment(2, {"MALLOC_TRIM_THRESHOLD_": "1"})
    assert {name for name in found if name.startswith(runner.TUNING)} == {
        "OMP_NUM_THREADS",
        "MALLOC_TRIM_THRESHOLD_",
    }
    assert found["HF_HOME"] == "/somewhere"


def test_unsloth_comes_first_whatever_the_arm_is_called(monkeypatch):
    order: list[str] = []
    real = builtins.__import__

    def spy(name, *rest, **keywords):
        if name in {"unsloth", "peft", "transformers"}:
            order.append(name)
            return SimpleNamespace(AutoModelForCausalLM=None, Trainer=None)
        return real(name, *rest, **keywords)

    monkeypatch.delitem(vars(fastft), "FastLanguageModel", raising=False)
    monkeypatch.setattr(fastft, "__getattr__", lambda name: order.append(f"fastft.{name}"))
    monkeypatch.setattr(builtins, "__import__", spy)
    found = []
    for arm in (FastftArm(), UnslothArm(), PeftArm(), object()):
        worker._import_libraries(arm, 1)
        found.append(tuple(order))
        order.clear()
    monkeypatch.undo()
    assert found == [
        ("fastft.FastLanguageModel", "peft", "transformers"),
        ("unsloth", "peft", "transformers"),
        ("peft", "transformers"),
        (),  # an arm of the user's own imports for itself
    ]


def test_the_committed_a_a_result_contains_one():
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    results = [Result.model_validate_json(path.read_text()) for path in folder.glob("a-a--*.json")]
    newest = max(results, key=lambda result: result.date)
    ratio = newest.tables["defaults"].ratios["fastft-again"]
    assert ratio.speed_low <= 1 <= ratio.speed_high


def test_an_arm_that_stopped_for_want_of_memory_says_so():
    class Trainer:
        def train(self, resume_from_checkpoint):
            memory.advice = "17 GB do not fit"

    class Memory:
        advice = None

        def stop(self):
            pass

    memory = Memory()
    with pytest.raises(MemoryError, match="17 GB do not fit") as caught:
        session.OpenSession(Loop(Trainer(), memory), {}).run()
    assert worker._status_of(caught.value)[0] == "oom"


@pytest.mark.skipif(worker.anonymous_bytes() is None, reason="the kernel does not tell")
def test_a_cap_on_a_cpu_counts_what_is_allocated_and_not_mapped_files(tmp_path, monkeypatch):
    """As torch maps a checkpoint: privately and writable."""
    size, reasons, told = 64 * 2**20, [], threading.Event()
    monkeypatch.setattr(worker._Memory, "anonymous_bytes", None)
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(2 * size)

    def too_much(reason: str) -> None:
        reasons.append(reason)
        told.set()

    with (
        worker._Memory("cpu", worker.anonymous_bytes() + size, None, too_much),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped,
    ):
        assert not any(mapped[i] for i in range(0, 2 * size, mmap.PAGESIZE))
        assert not told.wait(0.3), reasons
        hoard = b"x" * (2 * size)
        assert told.wait(10)
    assert len(hoard) == 2 * size
    assert "is above the cap of" in reasons[0]
    peak = worker._Memory.peak()
    assert peak.anonymous_bytes is not None
    assert peak.anonymous_bytes > size
    assert memory_bytes(peak) == peak.anonymous_bytes


# --- the GPU's figures, from a driver that is a script


def a_driver(tmp_path, monkeypatch, answers: dict[str, str]):
    path = tmp_path / "nvidia-smi"
    lines = "\n".join(
        f'*--query-gpu={query}*) echo "{answer}";;' for query, answer in answers.items()
    )
    path.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncase "$*" in\n{lines}\n*) exit 2;;\nesac\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_the_device_and_the_clocks_are_those_of_the_visible_gpu(tmp_path, monkeypatch):
    a_driver(
        tmp_path,
        monkeypatch,
        {"memory.used": "512", "clocks.sm,clocks_throttle_reasons": "1590, 0x4"},
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert worker._used_on_the_device() == 512 * 2**20
    assert (tmp_path / "asked").read_text().startswith("-i 3 ")
    assert worker._clocks("cuda") == (1590.0, "0x4")  # an older driver: the new field's name fails
    a_driver(tmp_path, monkeypatch, {"clocks.sm,clocks_event_reasons": "300, 0x0000000000000001"})
    assert worker._clocks("cuda") == (300.0, None)
    assert worker._used_on_the_device() is None


def a_gpu(name: str, vram_gb: float):
    return dataclasses.replace(
        runner.probe(), kind="cuda", name=name, vram_bytes=int(vram_gb * 1e9)
    )


def test_a_cap_holds_for_every_card_but_the_cases_own(monkeypatch):
    monkeypatch.setattr(runner, "_driver", lambda: "580")
    case = load_case("t4-llama3.1-8b-qlora")
    machine = runner.describe_machine(case, a_gpu("NVIDIA H200", 141))
    assert (machine.label, machine.card, machine.cap_bytes) == (
        "NVIDIA H200, capped at 15 GB",
        None,
        15 * 10**9,
    )
    own = runner.describe_machine(case, a_gpu("Tesla T4", 15.8))
    assert (own.label, own.card, own.cap_bytes) == ("Tesla T4", "t4", None)
    of_no_card = case.model_copy(update={"card": None})
    assert runner.describe_machine(of_no_card, a_gpu("NVIDIA H200", 141)).cap_bytes == 15 * 10**9
    free = case.model_copy(update={"card": None, "memory_cap_gb": None})
    assert runner.describe_machine(free, a_gpu("NVIDIA H200", 141)).cap_bytes is None
    with pytest.raises(FastFTError, match="only for a smaller card"):
        runner.describe_machine(load_case("h200-llama3.1-8b-qlora"), a_gpu("Tesla T4", 15.8))


def test_torch_attends_without_flash_kernels_where_the_card_has_none():
    import torch

    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()
    try:
        worker._no_flash_attention()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(before[0])
        torch.backends.cuda.enable_cudnn_sdp(before[1])


# --- the work


def test_a_model_larger_than_the_memory_is_written_part_by_part(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    case = load_case("smoke")
    monkeypatch.setattr(workload, "_device_with_room", lambda size: None)
    monkeypatch.setattr(workload.save_in_parts, "__defaults__", (200_000,))
    assert workload.make_checkpoint(case, tmp_path) == 1024
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    spread = float(model.get_input_embeddings().weight.detach().float().std())
    assert abs(spread - model.config.initializer_range) < 1e-3
    assert all(
        (p == 1).all() for name, p in model.named_parameters() if name.endswith("layernorm.weight")
    )
    lora = sum(
        a * b
        for a, b in [(16 * (128 + n), 2) for n in (128, 64, 64, 128, 384, 384)]
        + [(16 * (384 + 128), 2)]
    )
    assert workload.parameters_of(tmp_path / "start.safetensors") == lora


def test_a_real_models_special_tokens_are_never_drawn_and_count_as_padding():
    torch = pytest.importorskip("torch")
    from fastft.bench.witness import Witness

    case = load_case("smoke")
    never = [0, 7, 500, *range(900, 1024 + workload.NEW_TOKENS)]
    drawn = workload.draw(case, case.lengths, 8, 1024, never)
    assert not np.isin(np.concatenate(drawn.input_ids), never).any()
    witness = Witness(None, drawn.never)
    for pad in (
        7,
        500,
        1023,
        1024 + 3,
    ):  # whichever the library pads with, also one that it has added
        witness._counts = []
        witness._count(None, (torch.tensor([[*drawn.input_ids[0].tolist(), pad, pad]]),))
        assert int(witness._counts[0]) == len(drawn.input_ids[0])


def test_the_profiled_step_is_the_one_that_was_asked_for_and_a_cpu_says_what_it_lists(monkeypatch):
    torch = pytest.importorskip("torch")
    from fastft.bench.witness import Witness

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    witness = Witness(None, np.array([0]), profiled=2)
    witness.on_train_begin(None, None, None)
    work = {1: torch.exp, 2: torch.sin, 3: torch.cos}
    for step in (1, 2, 3):
        for _ in range(5 * step):
            work[step](torch.ones(10))
        witness.on_step_end(None, None, None)
    calls = {each["name"]: each["calls"] for each in witness.profile["longest"]}
    assert calls["aten::sin"] == 10
    assert not calls.keys() & {"aten::exp", "aten::cos"}
    assert witness.profile["gpu_busy_share"] is None
    assert witness.profile["launches"] is None
    assert "no GPU, so the CPU's operations; longest: aten::" in runner.profile_text(
        witness.profile
    )
    busy = witness.profile | {"gpu_busy_share": 0.25, "launches": 1200}
    assert "GPU busy 25%, 1,200 launches" in runner.profile_text(busy)


# --- mistakes before hours of work


def changed(tmp_path, change) -> Path:
    values = load_case("smoke").model_dump(mode="json", exclude_none=True)
    change(values)
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["tables"]["matched"]["arms"]["peft"]["settings"]["training"].update(per_device_train_batch_size=3),
         "is 3, the effective batch is 8"),
        (lambda v: v["tables"]["defaults"]["arms"]["peft"]["settings"].update(trainig={}), "unknown settings trainig"),
        (lambda v: v["tables"]["defaults"]["arms"].update(nobody={"source": "x"}), "unknown arm 'nobody'"),
        (lambda v: v["tables"]["defaults"]["arms"]["peft"]["settings"].update(training=5), "names and values"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_at_the_start(tmp_path, change, message):
    with pytest.raises(FastFTError, match=message):
        runner.run_case(load_case(str(changed(tmp_path, change))))


def test_the_second_cases_mistakes_are_found_before_the_first_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "run_case", lambda *rest, **keywords: pytest.fail("measured"))
    monkeypatch.setattr(signal, "signal", lambda *rest: None)  # pytest keeps its own
    two = ["bench", "--case", "smoke", "--case", "cpu-135m", "--out", str(tmp_path)]
    assert cli.run([*two, "--arms", "trl"]) == 2  # smoke has none
    assert cli.run([*two, "--arms", ","]) == 2
    assert cli.run(["bench", "--case", "smoke", "--tables", "other", "--out", str(tmp_path)]) == 2


def test_an_interrupted_benchmark_says_what_is_left(monkeypatch, tmp_path, capsys):
    def interrupted(*rest, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_case", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *rest: None)  # pytest keeps its own
    assert cli.run(["bench", "--case", "smoke", "--out", str(tmp_path)]) == 130
    assert "no result of case smoke" in capsys.readouterr().err


def test_export_and_generation_refuse_a_shape_that_cannot_be_exported():
    with pytest.raises(FastFTError, match="a vocabulary of 1,024"):
        run_export(load_case("smoke"))
    with pytest.raises(FastFTError, match="a vocabulary of 1,024"):
        run_generate(load_case("smoke"))
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(base_path())) == side_by_side.VOCABULARY


def test_a_case_without_tables_or_arms_is_refused(tmp_path):
    for change in (
        lambda v: v.update(tables={}),
        lambda v: v["tables"]["defaults"].update(arms={}),
    ):
        with pytest.raises(FastFTError, match="at least 1 item"):
            load_case(str(changed(tmp_path, change)))


def test_a_table_without_the_chosen_arms_is_left_out():
    assert list(runner._narrowed(load_case("cpu-135m"), ["trl"], None).tables) == ["defaults"]


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null/here"])
def test_a_folder_that_cannot_be_written_is_refused_at_the_start(place):
    with pytest.raises(FastFTError, match=r"cannot be written to|is a file"):
        command._writable(Path(place))


def test_a_full_disk_is_one_message():
    with (
        pytest.raises(CouldNotFinishError, match="No space left on device"),
        command._disk_errors(),
    ):
        raise OSError(28, "No space left on device", "/tmp/x")


def test_a_dead_fastft_is_no_success():
    case = load_case("smoke")
    dead = {"status": "crashed", "reason": "planted", "repeats": 0}
    table = {
        "arms": {"peft": {"status": "ok", "repeats": 1}, "fastft": dead},
        "ratios": {},
        "parity": {},
    }
    machine = {
        "device": "cpu",
        "label": "x",
        "card": None,
        "cpu": "x",
        "threads": 1,
        "memory_bytes": 1,
    }
    values = {
        "case": case,
        "case_hash": "x",
        "date": "2026",
        "commit": None,
        "dirty": False,
        "machine": machine,
    }
    found = Result.model_validate(
        values | {"versions": {}, "repeats": 1, "tables": {"defaults": table}, "records": []}
    )
    assert command._dead(found) == ["defaults, fastft: crashed (planted)"]
    found.tables["defaults"].arms["fastft"] = found.tables["defaults"].arms["peft"]
    assert command._dead(found) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_a_worker_dies_with_its_runner(tmp_path):
    child = "import time; from fastft.bench.worker import end_with_the_runner as e; e(); print('up', flush=True); time.sleep(60)"
    parent = (
        "import subprocess, sys, os, signal\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE, start_new_session=True)\n"
        "p.stdout.readline(); print(p.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its runner")


def test_json_of_the_records_names_what_each_worker_ran_with():
    record = Record(
        table="defaults",
        arm="peft",
        repeat=0,
        order=0,
        status="ok",
        environment={"OMP_NUM_THREADS": "2"},
    )
    assert json.loads(record.model_dump_json())["environment"] == {"OMP_NUM_THREADS": "2"}
