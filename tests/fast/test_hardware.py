"""Probing without torch, known cards, cgroup limits, and the automatic choices."""

import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from fastft import hardware
from fastft.errors import FastFTError
from fastft.hardware import (
    GIB,
    KNOWN_GPUS,
    NvidiaCard,
    _cgroup_memory,
    _visible,
    _with_gpu,
    compute_dtype,
    gpu_key,
    named_gpu,
    optimizer,
    probe,
)


def test_probe_is_fast_and_does_not_import_torch():
    code = (
        "import sys, time; start = time.perf_counter(); from fastft.hardware import probe; h = probe();"
        "print(time.perf_counter() - start, 'torch' in sys.modules, h.ram_bytes, h.cpu_cores)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch, ram, cores = done.stdout.split()
    assert torch == "False"
    assert float(seconds) < 1
    assert int(ram) > GIB // 2
    assert int(cores) >= 1


def test_probe_agrees_with_the_kernel():
    hardware = probe()
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        total = int(meminfo.read_text().split("MemTotal:")[1].split()[0]) * 1024
        assert hardware.ram_bytes <= total
    assert 0 < hardware.ram_free_bytes <= hardware.ram_bytes
    assert hardware.disk_free_bytes("/no/such/folder/yet") > 0


@pytest.mark.parametrize(
    ("name", "vram_gib", "key"),
    [
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80"),
        ("NVIDIA A100 80GB PCIe", 80, "a100-80"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA H200", 140.4, "h200"),
        ("NVIDIA GeForce RTX 3060", 12, "rtx3060"),
        ("NVIDIA GeForce RTX 3060 Ti", 8, None),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "rtx4060ti-16"),
        ("NVIDIA GeForce RTX 4060", 8, "rtx4060"),
        ("NVIDIA A10G", 22.5, "a10g"),
        ("NVIDIA A10", 22.5, "a10"),
        ("NVIDIA L40S", 45, "l40s"),
        ("NVIDIA RTX A6000", 48, "a6000"),
        ("Some Future Card", 96, None),
    ],
)
def test_driver_names_find_their_row(name, vram_gib, key):
    assert gpu_key(name, int(vram_gib * GIB)) == key


def test_what_people_type():
    assert gpu_key("T4") == "t4"
    assert gpu_key("rtx 4090") == gpu_key("RTX_4090") == gpu_key("GeForce RTX 4090") == "rtx4090"
    assert gpu_key("a100") == "a100-40"
    assert gpu_key("4090") == "rtx4090"
    assert gpu_key("a100-80gb") == gpu_key("A100 80 GB") == gpu_key("A100-SXM4-80GB") == "a100-80"
    assert gpu_key("RTX 3060 12GB") == "rtx3060"
    assert gpu_key("RTX 3060 8GB") is None  # another card
    assert gpu_key("V100 32GB") is None
    with pytest.raises(
        FastFTError, match=r"unknown GPU 'rtx309O'.*did you mean 'rtx3090'.*Known: .*t4"
    ):
        named_gpu("rtx309O")


def test_every_known_card_makes_a_sensible_machine():
    for key, gpu in KNOWN_GPUS.items():
        hardware = named_gpu(key)
        assert gpu_key(gpu.name, gpu.vram_bytes) == key
        assert 7 * GIB < hardware.vram_bytes < 200 * GIB
        assert 1e13 < gpu.flops < 1e16
        assert 1e11 < gpu.bandwidth < 1e13
        assert hardware.bf16 == (gpu.capability >= (8, 0)) == hardware.flash_attention_2
        assert "assumed" in hardware.notes[0]


def test_a_card_the_driver_reports():
    cpu = replace(probe(), kind="cpu", gpu_count=0)
    t4 = _with_gpu(cpu, [NvidiaCard("Tesla T4", 15 * GIB, 10 * GIB, (7, 5), "550.54")])
    assert (t4.kind, t4.gpu_count, t4.bf16) == ("cuda", 1, False)
    # What the driver keeps for itself is not free either.
    assert t4.vram_bytes == KNOWN_GPUS["t4"].vram_bytes
    assert t4.vram_free_bytes == 10 * GIB - (15 * GIB - t4.vram_bytes)
    other = _with_gpu(cpu, [NvidiaCard("Future 96", 96 * GIB, 96 * GIB, (12, 0), "600")] * 2)
    assert (other.gpu_count, other.flops) == (2, None)
    assert "not in the table" in other.notes[0]


def test_cuda_visible_devices():
    uuids = ["GPU-aa11", "GPU-bb22", "GPU-bb33"]
    assert _visible(None, uuids) == [0, 1, 2]
    assert _visible("", uuids) == _visible("-1", uuids) == []
    assert _visible("2,0", uuids) == [2, 0]
    assert _visible("1,7,0", uuids) == [1]  # CUDA stops at the first invalid entry
    assert _visible("GPU-bb3,GPU-aa11", uuids) == [2, 0]
    assert _visible("GPU-bb,0", uuids) == []  # two cards begin so
    assert _visible("GPU-cc", uuids) == []


class Driver:
    """libcuda and NVML of a machine with two cards; CUDA numbers them as in `order`."""

    def __init__(self, order=()):
        self.order = order

    def cuInit(self, flags):
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.order)
        return 0

    def cuDeviceGetUuid_v2(self, raw, index):
        raw._obj[:] = self.order[index].bytes
        return 0

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlShutdown(self):
        return 0


def test_the_first_card_is_cudas_not_the_buss(monkeypatch):
    slow, fast = uuid.UUID(int=1), uuid.UUID(int=2)
    cards = [
        NvidiaCard(
            "NVIDIA GeForce RTX 3060", 12 * GIB, 11 * GIB, (8, 6), "580", uuid=f"GPU-{slow}"
        ),
        NvidiaCard(
            "NVIDIA GeForce RTX 4090", 24 * GIB, 23 * GIB, (8, 9), "580", uuid=f"GPU-{fast}"
        ),
    ]
    monkeypatch.setattr(hardware, "_load_nvml", lambda: Driver())
    monkeypatch.setattr(hardware, "_read_card", lambda nvml, index: cards[index])
    monkeypatch.setattr(hardware, "_load_cuda", lambda: Driver([fast, slow]))
    assert hardware.nvidia_gpus() == cards[::-1]
    monkeypatch.setattr(hardware, "_load_cuda", lambda: Driver([slow]))  # one is hidden from CUDA
    assert hardware.nvidia_gpus() == cards[:1]
    monkeypatch.setattr(hardware, "_load_cuda", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"GPU-{fast}")
    assert hardware.nvidia_gpus() == cards[1:]
    seen = _with_gpu(replace(probe(), kind="cpu"), cards[::-1])
    assert "2 cards are visible" in seen.notes[-1]
    assert "RTX 4090" in seen.notes[-1]


def test_cgroup_v2_limit_counts_without_the_page_cache(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/box/inner\n")
    inner = tmp_path / "fs" / "box" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("5\n")
    box = inner.parent
    (box / "memory.max").write_text("1000\n")
    (box / "memory.current").write_text("700\n")
    (box / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert _cgroup_memory(tmp_path / "fs", own) == [(1000, 450)]


def test_cgroup_v1_without_limit_bounds_nothing(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/job\n1:cpu:/\n")
    job = tmp_path / "fs" / "memory" / "job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (job / "memory.usage_in_bytes").write_text("1\n")
    assert _cgroup_memory(tmp_path / "fs", own) == []
    (job / "memory.limit_in_bytes").write_text("4096\n")
    assert _cgroup_memory(tmp_path / "fs", own) == [(4096, 1)]


def test_choices_have_reasons():
    t4, l4 = named_gpu("t4"), named_gpu("l4")
    assert compute_dtype(t4).value == "float16"
    assert "Ampere" in compute_dtype(t4).reason
    assert compute_dtype(l4).value == "bfloat16"
    old_cpu = replace(probe(), kind="cpu", bf16=False)
    assert compute_dtype(old_cpu).value == "float32"
    assert "emulates" in compute_dtype(t4, "bfloat16").reason
    with pytest.raises(FastFTError, match="float16 does not train on a CPU"):
        compute_dtype(old_cpu, "float16")
    assert optimizer(t4).value == "adamw_8bit"
    assert optimizer(old_cpu, "adamw_8bit").value == "adamw"
