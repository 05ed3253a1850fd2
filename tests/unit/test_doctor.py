"""The doctor: the tested set, findings that follow from a machine, and the exit code."""

import re
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fastft.hardware import GIB, named_gpu, probe
from fastft.verification.doctor import (
    TESTED,
    Check,
    Report,
    check_cuda,
    check_hub,
    check_kernels,
    check_llama_cpp,
    check_memory,
    check_packages,
    check_python,
    check_surroundings,
    check_unsloth,
    doctor,
    torch_cuda,
)

ROOT = Path(__file__).parents[2]


def test_the_tested_set_is_what_the_requirements_pin():
    pins = {}
    for file in (ROOT / "requirements").glob("*.txt"):
        pins |= dict(re.findall(r"^([A-Za-z0-9_-]+)==([^\s;]+)", file.read_text(), re.M))
    normal = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    assert {name: normal[name.lower().replace("_", "-")] for name in TESTED} == TESTED


def test_quick_report_of_this_machine_blocks_nothing():
    report = doctor(quick=True, network=False)
    assert report.unsloth is None
    assert not report.blocking, [check for check in report.checks if check.status == "blocking"]
    assert report.exit_code == 0
    assert report.hardware["ram_bytes"] == probe().ram_bytes
    assert Report.model_validate_json(report.model_dump_json()) == report
    names = {check.name for check in report.checks}
    assert {"Python", "torch", "GPU", "RAM", "disk", "compiler"} <= names


def test_a_blocking_check_makes_the_exit_code_one():
    report = Report(
        checks=[Check(name="x", status="blocking", detail="")], hardware={}, unsloth=None
    )
    assert report.exit_code == 1


def test_versions_outside_the_declared_range_block_and_say_the_line_that_fixes_it():
    found = {check.name: check for check in check_packages({"peft": ">=99", "trl": ">=1"})}
    assert found["peft"].status == "blocking"
    assert found["peft"].fix == f"pip install 'peft=={TESTED['peft']}'"
    assert found["trl"].status in {"ok", "note"}


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10), "blocking"), ((3, 12), "ok"), ((3, 14), "blocking")]
)
def test_python_versions(version, status):
    assert next(check_python(version)).status == status


def test_little_ram_and_disk_are_said_with_numbers():
    poor = replace(probe(), ram_free_bytes=2 * GIB, disk_assumed_bytes=GIB // 4)
    ram, disk = check_memory(poor, ".")
    assert (ram.status, disk.status) == ("warning", "blocking")
    assert "2.0 of" in ram.detail
    assert "0.2 GiB" in disk.detail
    assert disk.fix


def test_colab_without_drive_is_a_warning(tmp_path):
    colab = replace(probe(), colab=True, wsl=False)
    (missing,) = check_surroundings(colab, tmp_path / "MyDrive")
    assert missing.status == "warning"
    assert "drive.mount" in (missing.fix or "")
    (mounted,) = check_surroundings(colab, tmp_path)
    assert mounted.status == "ok"


def test_hub_that_answers_and_hub_that_does_not(monkeypatch):
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert check_hub().status == "ok"
    server.shutdown()
    server.server_close()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        unreachable = check_hub(timeout=2)
    assert unreachable.status == "warning"
    assert unreachable.fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert check_hub().status == "note"


@pytest.mark.parametrize("endpoint", ["http://a b", "nonsense", "http://127.0.0.1:notaport", ""])
def test_an_endpoint_that_is_no_address_is_a_finding(endpoint, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert check_hub(timeout=1).status == "warning"


def test_a_driver_too_old_for_torch_blocks():
    (good,) = check_cuda((12, 4), (12, 8))  # one major version: the minor ones go together
    assert good.status == "ok"
    (old,) = check_cuda((11, 8), (12, 8))
    assert old.status == "blocking"
    assert "12.8" in old.detail
    assert "11.8" in old.detail
    assert "whl/cu118" in (old.fix or "")
    assert not list(check_cuda(None, (12, 8)))


def test_the_cuda_of_torch_is_read_from_its_files():
    torch = pytest.importorskip("torch")
    cuda = torch_cuda()
    assert (".".join(map(str, cuda)) if cuda else None) == torch.version.cuda


def test_llama_cpp_without_the_gpu_gives_the_cmake_line():
    pytest.importorskip("llama_cpp")
    here = check_llama_cpp(replace(probe(), kind="cpu"))
    assert here.status == "ok"
    if here.detail.endswith("no"):
        on_a_gpu = check_llama_cpp(named_gpu("t4"))
        assert on_a_gpu.status == "warning"
        assert "CMAKE_ARGS='-DGGML_CUDA=on'" in (on_a_gpu.fix or "")


def test_switched_off_kernels_say_so_and_how_to_get_them_back(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("FASTFT_NATIVE", "0")
    (found,) = check_kernels(replace(probe(), kind="cpu"))
    assert found.status == "note"
    assert found.detail.startswith("fell back: switched off by FASTFT_NATIVE=0")
    assert found.fix == "unset FASTFT_NATIVE"
    assert not list(check_kernels(named_gpu("t4")))


@pytest.mark.long
def test_unsloth_says_what_is_active_and_what_fell_back():
    pytest.importorskip("bitsandbytes")
    checks, state = check_unsloth(probe())
    assert checks[0].status == "ok", checks
    assert state is not None
    assert state["reported"]["unsloth"]
    assert state["active"]
    if probe().kind == "cpu":
        assert "chunked cross entropy" in state["active"]
        assert "Triton kernels" in state["fell_back"]
