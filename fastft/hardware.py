"""What this machine has, what a named card has, and the small automatic choices that follow from
it.

`probe()` asks the driver (NVML), the kernel and the cgroup, never torch, so it answers in
milliseconds. Every automatic choice is a `Choice(value, reason)`: callers print the reason once.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from fastft.errors import FastFTError, one_of

GIB = 1024**3
T = TypeVar("T")


class Choice(NamedTuple, Generic[T]):
    """An automatic choice and why it was made; unpacks as ``value, reason``."""

    value: T
    reason: str


@dataclass(frozen=True)
class Gpu:
    """A card as its maker describes it.

    `vram_bytes` is what ``torch.cuda.get_device_properties`` reports where that is known (a few
    per cent below the nominal size), `bandwidth` is bytes/s, `flops` dense 16-bit tensor FLOP/s
    with float32 accumulation (GeForce cards halve their rate there), `ram_bytes` and `disk_bytes`
    the host it is usually met in.
    """

    name: str
    vram_bytes: int
    bandwidth: float
    flops: float
    capability: tuple[int, int]
    source: str
    ram_bytes: int
    disk_bytes: int
    colab: bool = False


def _gpu(
    name: str,
    vram_gib: float,
    gb_per_sec: float,
    tflops: float,
    capability: tuple[int, int],
    source: str,
    ram_gib: float = 32,
    disk_gib: float = 200,
    colab: bool = False,
) -> Gpu:
    sizes = (int(gib * GIB) for gib in (vram_gib, ram_gib, disk_gib))
    vram, ram, disk = sizes
    return Gpu(name, vram, gb_per_sec * 1e9, tflops * 1e12, capability, source, ram, disk, colab)


_DATASHEET, _WHITEPAPER = (
    "NVIDIA datasheet",
    "NVIDIA architecture whitepaper, FP16 tensor with FP32 accumulate",
)
# Colab's RAM and disk: what its runtimes of that type show; they change without notice.
KNOWN_GPUS: dict[str, Gpu] = {
    "t4": _gpu("Tesla T4", 14.74, 320, 65, (7, 5), _DATASHEET, 12.67, 70, True),
    "l4": _gpu("NVIDIA L4", 22.16, 300, 121, (8, 9), _DATASHEET, 53, 190, True),
    "a100-40": _gpu("NVIDIA A100 40GB", 39.56, 1555, 312, (8, 0), _DATASHEET, 83.5, 190, True),
    "a100-80": _gpu("NVIDIA A100 80GB", 79.25, 2039, 312, (8, 0), _DATASHEET, 167, 190, True),
    "h100": _gpu("NVIDIA H100 80GB HBM3", 79.1, 3350, 989, (9, 0), _DATASHEET, 192, 500),
    "h200": _gpu("NVIDIA H200", 139.8, 4800, 989, (9, 0), _DATASHEET, 192, 500),
    "b200": _gpu("NVIDIA B200", 178, 8000, 2250, (10, 0), _DATASHEET, 256, 500),
    "v100-16": _gpu("Tesla V100 16GB", 15.77, 900, 125, (7, 0), _DATASHEET, 64, 200),
    "a10": _gpu("NVIDIA A10", 22.0, 600, 125, (8, 6), _DATASHEET, 64, 200),
    "a10g": _gpu("NVIDIA A10G", 22.0, 600, 70, (8, 6), _DATASHEET, 64, 200),
    "a40": _gpu("NVIDIA A40", 44.4, 696, 149.7, (8, 6), _DATASHEET, 128, 200),
    "a6000": _gpu("NVIDIA RTX A6000", 47.5, 768, 154.8, (8, 6), _WHITEPAPER, 64, 500),
    "l40s": _gpu("NVIDIA L40S", 44.4, 864, 362, (8, 9), _DATASHEET, 128, 500),
    "rtx2080ti": _gpu("NVIDIA GeForce RTX 2080 Ti", 10.75, 616, 53.8, (7, 5), _WHITEPAPER),
    "rtx3060": _gpu("NVIDIA GeForce RTX 3060", 11.76, 360, 25.5, (8, 6), _WHITEPAPER),
    "rtx3070": _gpu("NVIDIA GeForce RTX 3070", 7.78, 448, 40.6, (8, 6), _WHITEPAPER),
    "rtx3080": _gpu("NVIDIA GeForce RTX 3080", 9.77, 760, 59.5, (8, 6), _WHITEPAPER),
    "rtx3090": _gpu("NVIDIA GeForce RTX 3090", 23.69, 936, 71, (8, 6), _WHITEPAPER),
    "rtx4060": _gpu("NVIDIA GeForce RTX 4060", 7.75, 272, 30.2, (8, 9), _WHITEPAPER),
    "rtx4060ti-16": _gpu("NVIDIA GeForce RTX 4060 Ti 16GB", 15.6, 288, 44.1, (8, 9), _WHITEPAPER),
    "rtx4070": _gpu("NVIDIA GeForce RTX 4070", 11.72, 504, 58.3, (8, 9), _WHITEPAPER),
    "rtx4080": _gpu("NVIDIA GeForce RTX 4080", 15.7, 717, 97.5, (8, 9), _WHITEPAPER),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 23.64, 1008, 165.2, (8, 9), _WHITEPAPER, 64),
    "rtx5090": _gpu("NVIDIA GeForce RTX 5090", 31.36, 1792, 209.5, (12, 0), _WHITEPAPER, 64),
}
# Names that leave the memory size open mean the smaller card: a plan for it holds on the larger one
# too.
_ALIASES = {"a100": "a100-40", "v100": "v100-16", "rtx4060ti": "rtx4060ti-16", "h100-80": "h100"}


@dataclass(frozen=True)
class Hardware:
    """One machine. Sizes are bytes; `bandwidth` (bytes/s) and `flops` (FLOP/s) are None where
    nobody tabled them.
    """

    name: str
    kind: Literal["cuda", "mps", "cpu"]
    gpu_count: int
    vram_bytes: int
    """Memory of one GPU as torch sees it; on Apple Silicon the share of RAM that the GPU may take;
    0 on a CPU.
    """
    vram_free_bytes: int
    capability: tuple[int, int] | None
    bf16: bool
    """Whether what computes (GPU or CPU) multiplies bfloat16 natively."""
    ram_bytes: int
    """Honours a container's limit."""
    ram_free_bytes: int
    cpu_cores: int
    """Cores this process may use (affinity and container quota)."""
    cpu_bf16: bool
    colab: bool = False
    apple_silicon: bool = False
    wsl: bool = False
    bandwidth: float | None = None
    flops: float | None = None
    disk_path: str = "."
    disk_assumed_bytes: int | None = None
    """Free disk of a machine that is only named, not probed."""
    notes: tuple[str, ...] = field(default=())

    @property
    def flash_attention_2(self) -> bool:
        """Whether FlashAttention 2 runs here: Ampere (8.0) or newer."""
        return self.kind == "cuda" and self.capability is not None and self.capability >= (8, 0)

    def disk_free_bytes(self, path: str | Path | None = None) -> int:
        """Free bytes on the disk that holds `path`, or its nearest existing parent."""
        if self.disk_assumed_bytes is not None:
            return self.disk_assumed_bytes
        return _disk_free(path if path is not None else self.disk_path)


def probe(path: str | Path = ".") -> Hardware:
    """Return this machine; `path` is where runs will be kept (its disk counts). Does not import
    torch.
    """
    ram, ram_free = _ram()
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    cpu_bf16 = _cpu_bf16()
    cores = usable_cores()
    cpu = Hardware(
        name=_cpu_name(),
        kind="cpu",
        gpu_count=0,
        vram_bytes=0,
        vram_free_bytes=0,
        capability=None,
        bf16=cpu_bf16,
        ram_bytes=ram,
        ram_free_bytes=ram_free,
        cpu_cores=cores,
        cpu_bf16=cpu_bf16,
        colab=is_colab(),
        apple_silicon=apple,
        wsl=_is_wsl(),
        flops=cores * _FLOPS_PER_CORE[cpu_bf16],
        disk_path=str(path),
    )
    cards = nvidia_gpus()
    if cards:
        reason = _torch_without_cuda()
        return (
            replace(cpu, notes=(f"{cards[0].name} is not used: {reason}",))
            if reason
            else _with_gpu(cpu, cards)
        )
    if apple:
        return _with_unified_memory(cpu)
    return cpu


def _with_unified_memory(cpu: Hardware, limit_mb: str | None = None) -> Hardware:
    """The same machine with Apple's GPU. It has no rate: nobody of us measured one."""
    share = metal_working_set(cpu.ram_bytes, limit_mb)
    free = min(share, cpu.ram_free_bytes)
    return replace(cpu, kind="mps", gpu_count=1, vram_bytes=share, vram_free_bytes=free, flops=None)


def metal_working_set(ram_bytes: int, limit_mb: str | None = None) -> int:
    """Return how much of the unified memory Metal's GPU should use at most, in bytes.

    Without a limit set by the owner (sysctl iogpu.wired_limit_mb, MiB, which is read where
    `limit_mb` is None) recommendedMaxWorkingSetSize, as it is published for machines: 10.67 of 16,
    21.33 of 32 GiB; 27 of 36, 48 of 64, 72 of 96 GiB. Newer systems allow more of 128 GiB and up.
    MLX asks the device for it, and lets a graph take 1.5 times as much before it fails, which
    swaps.
    """
    if limit_mb is None and sys.platform == "darwin":
        limit_mb = _sysctl("iogpu.wired_limit_mb")
    if limit_mb and limit_mb.isdigit() and int(limit_mb):
        return min(ram_bytes, int(limit_mb) << 20)
    return ram_bytes * 2 // 3 if ram_bytes <= 32 * GIB else ram_bytes * 3 // 4


def mlx_is_installed() -> bool:
    """Whether mlx and mlx-lm can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("mlx", "mlx_lm"))


# Matmul FLOP/s of one core, bfloat16 with AVX512-BF16 (425e9 measured on a 2-core EPYC) and float32
# AVX2 at about 3 GHz (2 FMA ports x 8 lanes x 2). A guess for any other CPU, and called one in the
# plan.
_FLOPS_PER_CORE = {True: 425e9, False: 96e9}


def cpu_only(cores: int, *, bf16: bool) -> Hardware:
    """Return this machine as if it had no GPU and a CPU of so many cores, which multiply bfloat16
    natively or not.
    """
    return replace(
        probe(),
        kind="cpu",
        gpu_count=0,
        vram_bytes=0,
        vram_free_bytes=0,
        capability=None,
        bf16=bf16,
        cpu_bf16=bf16,
        cpu_cores=cores,
        bandwidth=None,
        flops=cores * _FLOPS_PER_CORE[bf16],
        notes=(),
    )


def named_gpu(name: str) -> Hardware:
    """Return a machine with the card `name` of KNOWN_GPUS, as it is usually met (a Colab runtime
    for t4, l4, a100).

    RAM and disk of that host are assumed, and `notes` says so. Raises FastFTError listing the
    known cards. mac-36 is a Mac with Apple Silicon and 36 GiB of unified memory (any size).
    """
    mac = re.fullmatch(r"mac-(\d{1,3})(gb)?", name.strip().lower())
    if mac is not None and int(mac[1]):
        return named_mac(int(mac[1]))
    key = gpu_key(name)
    if key is None:
        raise one_of("GPU", name, [*KNOWN_GPUS, *(f"mac-{gib}" for gib in MACS)])
    gpu = KNOWN_GPUS[key]
    where = "a Colab runtime" if gpu.colab else "a machine"
    return Hardware(
        name=gpu.name,
        kind="cuda",
        gpu_count=1,
        vram_bytes=gpu.vram_bytes,
        vram_free_bytes=gpu.vram_bytes,
        capability=gpu.capability,
        bf16=gpu.capability >= (8, 0),
        ram_bytes=gpu.ram_bytes,
        # A fresh Colab runtime uses about 1 GiB before anything runs.
        ram_free_bytes=gpu.ram_bytes - GIB,
        cpu_cores=2 if key == "t4" else 8,
        cpu_bf16=False,
        colab=gpu.colab,
        bandwidth=gpu.bandwidth,
        flops=gpu.flops,
        disk_assumed_bytes=gpu.disk_bytes,
        notes=(
            f"assumed: {where} with {gpu.ram_bytes / GIB:.1f} GiB RAM and "
            f"{gpu.disk_bytes / GIB:.0f} GiB free disk",
        ),
    )


MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
"""Sizes of unified memory that Macs with Apple Silicon are sold with, GiB."""
MACOS_BYTES = 4 * GIB
"""What macOS and its programs take of a Mac that is only named: assumed, not measured."""


def named_mac(gib: int) -> Hardware:
    """Return a Mac with Apple Silicon and so many GiB of memory, which CPU and GPU share."""
    ram = gib * GIB
    cpu = Hardware(
        name=f"Apple Silicon with {gib} GiB",
        kind="cpu",
        gpu_count=0,
        vram_bytes=0,
        vram_free_bytes=0,
        capability=None,
        bf16=True,
        ram_bytes=ram,
        ram_free_bytes=max(ram - MACOS_BYTES, GIB),
        cpu_cores=8,
        cpu_bf16=True,
        apple_silicon=True,
        disk_assumed_bytes=100 * GIB,
        notes=(
            f"assumed: macOS and other programs take {MACOS_BYTES / GIB:.0f} GiB, and 100 GiB of "
            "disk are free",
            "CPU and GPU share the memory, so the GPU's part is counted in RAM, too. The "
            "arithmetic was compared with MLX on a Linux CPU; nobody of us has run it on a Mac",
        ),
    )
    return _with_unified_memory(cpu, limit_mb="0")


def gpu_key(name: str, vram_bytes: int | None = None) -> str | None:
    """Return the KNOWN_GPUS key for what a person or the driver calls a card, or None."""
    text = re.sub(r"nvidia|geforce|tesla|quadro|[\s_]", "", name.lower())
    text = _ALIASES.get(text, text)
    if text in KNOWN_GPUS:
        return text
    if f"rtx{text}" in KNOWN_GPUS:  # people say 4090
        return f"rtx{text}"
    size = re.search(r"(\d+) ?gb\b", name.lower())
    if vram_bytes is None and size:
        vram_bytes = int(size[1]) * GIB
    # Driver names carry more ("NVIDIA A100-SXM4-80GB"): take the longest key whose model part is in
    # the name.
    fits = [
        key
        for key in KNOWN_GPUS
        if re.search(rf"(?<![a-z0-9]){key.split('-')[0]}(?![a-z0-9])", _spaced(name))
    ]
    if vram_bytes is None:
        return max(fits, key=len) if len(fits) == 1 else None
    close = [key for key in fits if abs(KNOWN_GPUS[key].vram_bytes / vram_bytes - 1) < 0.15]
    return max(close, key=len) if close else None


def _spaced(name: str) -> str:
    """Lower-case driver name with 'RTX 3060' and 'Ti' joined, other words kept apart."""
    text = re.sub(
        r"\b(rtx)\s+(a?)(\d+)", lambda m: f"{'' if m[2] else m[1]}{m[2]}{m[3]}", name.lower()
    )
    return re.sub(r"(\d)\s+(ti|super)\b", r"\1\2", text)


class NvidiaCard(NamedTuple):
    """One card as the driver reports it (bytes)."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]
    driver: str
    cuda: tuple[int, int] | None = None
    """The newest CUDA that the driver runs."""
    uuid: str = ""
    """GPU-..., as nvidia-smi -L and CUDA_VISIBLE_DEVICES write it."""


class _NvmlMemory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


def nvidia_gpus() -> list[NvidiaCard]:
    """Return the NVIDIA cards that this process would use, in CUDA's order, without a CUDA context.

    The first is the one that computes. NVML lists cards by their place on the bus, CUDA the fastest
    first (unless CUDA_DEVICE_ORDER says otherwise), and CUDA_VISIBLE_DEVICES may name UUIDs: where
    that can differ, CUDA's driver is asked, else NVML's list is CUDA's.
    """
    nvml = _load_nvml()
    if nvml is None or nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        cards = [_read_card(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if len(cards) > 1 and (order := _cuda_order(_load_cuda())) is not None:
        by_uuid = {card.uuid: card for card in cards}
        # A slice of a card (MIG) has a UUID of its own, which NVML's list of cards lacks.
        if all(uuid in by_uuid for uuid in order):
            return [by_uuid[uuid] for uuid in order]
    return [cards[index] for index in _visible(variable, [card.uuid for card in cards])]


def _cuda_order(cuda: Any) -> list[str] | None:
    """UUIDs of the cards as CUDA numbers them in this process; None where the driver does not say.

    The driver itself applies CUDA_DEVICE_ORDER and CUDA_VISIBLE_DEVICES. No context is created.
    """
    if cuda is None or cuda.cuInit(0) != 0:
        return None
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None
    found = []
    for index in range(count.value):
        raw = (ctypes.c_ubyte * 16)()
        if cuda.cuDeviceGetUuid_v2(ctypes.byref(raw), index) != 0:
            return None
        found.append(f"GPU-{uuid.UUID(bytes=bytes(raw))}")
    return found


def _load_cuda() -> ctypes.CDLL | None:
    return _load_first("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1", "nvcuda.dll")


def _load_nvml() -> ctypes.CDLL | None:
    return _load_first("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1", "nvml.dll")


def _load_first(*names: str) -> ctypes.CDLL | None:
    """The first of these libraries that is there; WSL2 keeps them outside the loader's path."""
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _read_card(nvml: ctypes.CDLL, index: int) -> NvidiaCard:
    handle = ctypes.c_void_p()
    nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    text = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetName(handle, text, 96)
    name = text.value.decode()
    memory = _NvmlMemory()
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    driver = ctypes.create_string_buffer(96)
    nvml.nvmlSystemGetDriverVersion(driver, 96)
    identity = ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetUUID(handle, identity, 96)
    return NvidiaCard(
        name,
        memory.total,
        memory.free,
        (major.value, minor.value),
        driver.value.decode(),
        _driver_cuda(nvml),
        identity.value.decode(),
    )


def _driver_cuda(nvml: ctypes.CDLL) -> tuple[int, int] | None:
    number = ctypes.c_int()
    if not hasattr(
        nvml, "nvmlSystemGetCudaDriverVersion_v2"
    ) or nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number)):
        return None
    return number.value // 1000, number.value % 1000 // 10  # 12080 is 12.8


def _visible(variable: str | None, uuids: Sequence[str]) -> list[int]:
    """Indices that CUDA_VISIBLE_DEVICES leaves of the cards with these UUIDs.

    An entry is an index or the beginning of a UUID; as CUDA does, the list ends at the first entry
    that is no card.
    """
    if variable is None:
        return list(range(len(uuids)))
    chosen = []
    for part in (part.strip() for part in variable.split(",")):
        if part.isdigit():
            found = [int(part)] if int(part) < len(uuids) else []
        else:
            found = [i for i, one in enumerate(uuids) if part and one.startswith(part)]
        if len(found) != 1:
            break
        chosen += found
    return chosen


def _with_gpu(cpu: Hardware, cards: list[NvidiaCard]) -> Hardware:
    card = cards[0]
    key = gpu_key(card.name, card.total_bytes)
    known = KNOWN_GPUS[key] if key else None
    # NVML counts memory that the driver reserves (ECC, page tables); torch sees what the table
    # says.
    vram = min(card.total_bytes, known.vram_bytes) if known else int(card.total_bytes * 0.98)
    return replace(
        cpu,
        name=card.name,
        kind="cuda",
        gpu_count=len(cards),
        vram_bytes=vram,
        vram_free_bytes=max(0, min(vram, card.free_bytes - (card.total_bytes - vram))),
        capability=card.capability,
        bf16=card.capability >= (8, 0),
        bandwidth=known.bandwidth if known else None,
        flops=known.flops if known else None,
        notes=_notes_of(cards, known is not None),
    )


def _notes_of(cards: list[NvidiaCard], known: bool) -> tuple[str, ...]:
    name, notes = cards[0].name, []
    if not known:
        notes.append(f"{name} is not in the table of known cards: no time estimate")
    if len(cards) > 1:
        notes.append(
            f"{len(cards)} cards are visible; one process computes on one of them, CUDA's first "
            f"({name}). CUDA_VISIBLE_DEVICES chooses another"
        )
    return tuple(notes)


def _torch_without_cuda() -> str | None:
    """Return why torch cannot use an NVIDIA card, or None. Reads the version's local part, does
    not import.
    """
    torch = sys.modules.get("torch")
    if torch is not None and not torch.cuda.is_available():
        return f"torch {torch.__version__} does not see it"
    version = installed(["torch"]).get("torch", "")
    return f"torch {version} is a CPU build" if version.endswith("+cpu") else None


def _ram() -> tuple[int, int]:
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_memory():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Return (limit, used without the page cache) for each cgroup that bounds this process (v1 and
    v2).
    """
    bounds = []
    for folder, limit_file, used_file in _cgroup_folders(root, own, "memory"):
        limit, used = _read_int(folder / limit_file), _read_int(folder / used_file)
        if limit is None or limit >= 1 << 60:  # v2 writes "max", v1 a number near 2**63
            continue
        stat = folder / "memory.stat"
        # File pages are given back under pressure, so they are not "used".
        cache = (
            re.search(r"^(?:total_)?inactive_file (\d+)", stat.read_text(), re.M)
            if stat.is_file()
            else None
        )
        bounds.append((limit, max(0, (used or 0) - (int(cache[1]) if cache else 0))))
    return bounds


def _cgroup_folders(root: Path, own: Path, controller: str) -> list[tuple[Path, str, str]]:
    """Return (folder, limit file, usage file) for this process's cgroup and each of its parents."""
    found = []
    for line in own.read_text().splitlines() if own.is_file() else []:
        _, names, path = line.split(":", 2)
        if names == "":
            base, files = root, ("memory.max", "memory.current")
        elif controller in names.split(","):
            base, files = root / controller, ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        here = base / path.lstrip("/")
        # Inside a container the path may be the host's: the mounted root is then the own group.
        chain = [here, *here.parents] if here.is_dir() else [base]
        found += [(folder, *files) for folder in chain if folder.is_relative_to(base)]
    return found


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return {package: version} of those that are installed; none is imported."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def usable_cores() -> int:
    """Return the cores that this process may use: its affinity, and its control group's share."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, math.ceil(int(allowed) / int(period)))
    return max(1, cores)


def peak_resident_bytes(*, children: bool = False) -> int:
    """Return the peak resident memory of this process, or of any child it waited for as well."""
    import resource  # not on Windows

    whose = [resource.RUSAGE_SELF, *([resource.RUSAGE_CHILDREN] if children else [])]
    peak = max(resource.getrusage(who).ru_maxrss for who in whose)
    return peak if sys.platform == "darwin" else peak * 1024


def anonymous_bytes() -> int | None:
    """Return the resident memory of this process that is no page of a file (proc_pid_status(5),
    RssAnon); None where the kernel does not tell.
    """
    status = Path("/proc/self/status")
    match = (
        re.search(r"^RssAnon:\s*(\d+) kB", status.read_text(), re.M) if status.is_file() else None
    )
    return int(match[1]) * 1024 if match else None


def cpu_flags() -> frozenset[str]:
    """Return the feature flags of the first CPU as the kernel names them (empty where there is no
    /proc).
    """
    info = Path("/proc/cpuinfo")
    match = (
        re.search(r"^(?:flags|Features)\s*:\s*(.*)$", info.read_text(), re.M)
        if info.is_file()
        else None
    )
    return frozenset(match[1].split()) if match else frozenset()


def _cpu_bf16() -> bool:
    if sys.platform == "darwin":
        return _sysctl("hw.optional.arm.FEAT_BF16") == "1"
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_name() -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or "Apple"
    info = Path("/proc/cpuinfo")
    match = (
        re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.M) if info.is_file() else None
    )
    return match[1].strip() if match else platform.processor() or platform.machine()


def _sysctl(key: str) -> str | None:
    try:
        return subprocess.run(
            ["sysctl", "-n", key], capture_output=True, text=True, timeout=5
        ).stdout.strip()
    except OSError:
        return None


def is_colab() -> bool:
    """Whether this process runs in Google Colab."""
    return "COLAB_RELEASE_TAG" in os.environ or (
        importlib.util.find_spec("google") is not None and _has_colab()
    )


def _has_colab() -> bool:
    return importlib.util.find_spec("google.colab") is not None


def _is_wsl() -> bool:
    release = Path("/proc/sys/kernel/osrelease")
    return release.is_file() and "microsoft" in release.read_text().lower()


def _disk_free(path: str | Path) -> int:
    place = Path(path).expanduser().absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def compute_dtype(hardware: Hardware, requested: str = "auto") -> Choice[str]:
    """Return float32, bfloat16 or float16 and why. Raises FastFTError for float16 on a CPU, which
    cannot train so.
    """
    if requested == "float16" and hardware.kind == "cpu":
        raise FastFTError(
            "model.dtype float16 does not train on a CPU (no loss scaling there); set "
            "model.dtype: auto, which "
            f"is {compute_dtype(hardware).value} here."
        )
    if requested != "auto":
        slow = requested == "bfloat16" and not hardware.bf16
        return Choice(
            requested,
            "asked for" + (f", although {hardware.name} only emulates bfloat16" if slow else ""),
        )
    if hardware.kind == "cuda":
        major, minor = hardware.capability or (0, 0)
        if hardware.bf16:
            return Choice(
                "bfloat16",
                f"{hardware.name} is SM {major}{minor}, which multiplies bfloat16 natively",
            )
        return Choice(
            "float16",
            f"{hardware.name} is SM {major}{minor}, older than Ampere (SM 80): no bfloat16",
        )
    if hardware.kind == "mps":
        return Choice(
            "float32", "MPS has no loss scaling for float16, and bfloat16 only on some chips"
        )
    if hardware.bf16:
        return Choice("bfloat16", f"{hardware.name} multiplies bfloat16 natively")
    return Choice(
        "float32", f"{hardware.name} has no bfloat16 instructions (AVX512-BF16, AMX or Arm BF16)"
    )


def optimizer(hardware: Hardware, requested: str = "auto") -> Choice[Any]:
    """Return adamw, adamw_8bit or paged_adamw_8bit and why."""
    if hardware.kind != "cuda":
        if requested in ("auto", "adamw"):
            return Choice("adamw", "asked for" if requested == "adamw" else "fused AdamW: no GPU")
        return Choice("adamw", f"{requested} needs an NVIDIA GPU; fused AdamW instead")
    if requested != "auto":
        return Choice(requested, "asked for")
    return Choice("adamw_8bit", "on a GPU: 2 bytes of state a trained parameter instead of 8")
