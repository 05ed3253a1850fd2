"""`fastft doctor`: what is installed, what this machine can do, what fell back and why, and the
line that fixes it.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from fastft import child
from fastft.hardware import GIB, Hardware, compute_dtype, installed, nvidia_gpus, probe
from fastft.hub import endpoint, shown_endpoint

Status = Literal["ok", "note", "warning", "blocking"]

TESTED = {
    "torch": "2.13.0", "transformers": "5.17.0", "peft": "0.21.2", "trl": "1.15.0",
    "datasets": "4.8.5", "accelerate": "1.15.0", "safetensors": "0.8.0",
    "huggingface_hub": "1.33.0", "bitsandbytes": "0.50.2", "unsloth": "2026.10.9",
    "unsloth_zoo": "2026.10.9", "gguf": "0.19.0", "llama-cpp-python": "0.3.36",
}  # fmt: skip
"""The set that the tests ran with. requirements/*.txt pin the same versions; a test compares the
two.
"""
OPTIONAL = {"bitsandbytes", "unsloth", "unsloth_zoo", "gguf", "llama-cpp-python"}
REPORTED = (
    "name", "kind", "gpu_count", "vram_bytes", "vram_free_bytes", "capability", "bf16", "ram_bytes",
    "ram_free_bytes", "cpu_cores", "colab", "wsl",
)  # fmt: skip
"""What of the hardware stands in the report, beside the room on the disk."""
_UNSLOTH_FIX = (
    f"pip install --no-deps unsloth=={TESTED['unsloth']} unsloth_zoo=={TESTED['unsloth_zoo']}"
)


@dataclass
class Check:
    """One finding. `fix` is the line that mends it, where there is one."""

    name: str
    status: Status
    detail: str
    fix: str | None = None


class Report(BaseModel):
    """All findings; `blocking` says whether fastft cannot work here at all."""

    checks: list[Check]
    hardware: dict[str, Any]
    unsloth: dict[str, Any] | None
    """What Unsloth reports about itself; None where it was not asked or could not be imported."""

    @property
    def blocking(self) -> bool:
        """Whether any check blocks."""
        return any(check.status == "blocking" for check in self.checks)

    @property
    def exit_code(self) -> int:
        """1 where something blocks, else 0."""
        return int(self.blocking)

    def print(self, console: Any = None) -> None:
        """Print one line a check, and below it the line that fixes it."""
        from rich.console import Console
        from rich.markup import escape

        console = console or Console(soft_wrap=True)
        marks = {
            "ok": "[green]ok[/]",
            "note": "[cyan]note[/]",
            "warning": "[yellow]warning[/]",
            "blocking": "[red]BLOCKS[/]",
        }
        for check in self.checks:
            console.print(f"{marks[check.status]:>22} {check.name}: {escape(check.detail)}")
            if check.fix:
                console.print(f"             fix: {escape(check.fix)}", style="bold")
        count = sum(check.status in {"warning", "blocking"} for check in self.checks)
        findings = f"{count} finding{'s' if count > 1 else ''} to look at"
        console.print(f"\n{findings if count else 'nothing to mend'}")


def doctor(path: str | Path = ".", *, quick: bool = False, network: bool = True) -> Report:
    """Return the report for this machine; runs will be kept at `path` (its disk counts).

    `quick` leaves out what takes seconds: importing Unsloth (10 to 20 s, in a process of its own)
    and llama.cpp. `network` False does not ask the Hub.
    """
    hardware = probe(path)
    checks = [*check_python(), *check_packages(), *check_gpu(hardware)]
    checks += check_memory(hardware, path)
    checks += [*check_surroundings(hardware), *check_compiler(hardware)]
    if network:
        checks.append(check_hub())
    unsloth = None
    if not quick:
        checks.append(check_llama_cpp(hardware))
        checks += check_kernels(hardware)
        found, unsloth = check_unsloth(hardware)
        checks += found
    summary = {name: getattr(hardware, name) for name in REPORTED}
    summary["disk_free_bytes"] = hardware.disk_free_bytes(path)
    return Report(checks=checks, hardware=summary, unsloth=unsloth)


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Check]:
    """Python 3.11 to 3.13, 64 bit."""
    text = ".".join(map(str, version))
    if (3, 11) <= version < (3, 14):
        yield Check("Python", "ok", f"{text} on {platform.system()} {platform.machine()}")
    else:
        fix = "uv venv --python 3.12, or conda create -n fastft python=3.12"
        yield Check("Python", "blocking", f"{text}; fastft needs 3.11 to 3.13", fix)


def check_packages(ranges: dict[str, str] | None = None) -> Iterator[Check]:
    """Each package against fastft's declared range (blocks) and the tested version (a note)."""
    ranges = declared_ranges() if ranges is None else ranges
    for name, tested in TESTED.items():
        installed = _version(name)
        wanted = ranges.get(name, "")
        if installed is None:
            yield _missing(name, tested)
        elif wanted and not _within(installed, wanted):
            fix = f"pip install '{name}=={tested}'"
            yield Check(name, "blocking", f"{installed} is outside {wanted}", fix)
        elif installed.split("+")[0] == tested:
            yield Check(name, "ok", f"{installed}, the tested version")
        else:
            yield Check(name, "note", f"{installed} is allowed; tested with {tested}")
    versions = {_version("unsloth"), _version("unsloth_zoo")} - {None}
    if len(versions) == 2:
        detail = f"unsloth and unsloth_zoo differ: {' and '.join(sorted(str(v) for v in versions))}"
        yield Check("unsloth versions", "warning", detail, _UNSLOTH_FIX)


def _missing(name: str, tested: str) -> Check:
    if name in {"unsloth", "unsloth_zoo"}:
        detail = "not installed; training runs on plain transformers + peft"
        return Check(name, "warning", detail, _UNSLOTH_FIX)
    if name in OPTIONAL:
        uses = {
            "bitsandbytes": "NF4, int8 and 8-bit AdamW",
            "gguf": "GGUF export",
            "llama-cpp-python": "GGUF export and chat",
        }
        detail = f"not installed; needed for {uses[name]}"
        return Check(name, "note", detail, f"pip install '{name}=={tested}'")
    return Check(name, "blocking", "not installed", f"pip install '{name}=={tested}'")


def declared_ranges() -> dict[str, str]:
    """Return {package: version range} from fastft's own metadata, extras included."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("fastft") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {parsed.name: str(parsed.specifier) for parsed in map(Requirement, lines)}


def _version(name: str) -> str | None:
    return installed([name]).get(name)


def _within(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def check_gpu(hardware: Hardware) -> Iterator[Check]:
    """Card, driver, capability, free VRAM; or why a card that is there is not used."""
    cards = nvidia_gpus()
    if hardware.kind == "cuda":
        card = cards[0]
        dtype, why = compute_dtype(hardware)
        sm = "".join(map(str, hardware.capability or ()))
        detail = (
            f"{hardware.gpu_count} x {card.name}, SM {sm}, driver {card.driver}; {dtype} ({why})"
        )
        yield Check("GPU", "ok", detail)
        yield from check_cuda(card.cuda, torch_cuda())
        free, total = hardware.vram_free_bytes / GIB, hardware.vram_bytes / GIB
        busy = free < 0.8 * total
        how = "nvidia-smi shows what holds the rest; end it, or restart the notebook's runtime"
        fix = how if busy else None
        yield Check("VRAM", "warning" if busy else "ok", f"{free:.1f} of {total:.1f} GiB free", fix)
    elif cards:
        detail = "; ".join(hardware.notes)
        fix = (
            f"pip uninstall -y torch && pip install torch=={TESTED['torch']}   (on Linux this is "
            "the CUDA build)"
        )
        yield Check("GPU", "warning", detail, fix)
    elif hardware.kind == "mps":
        yield Check("GPU", "note", f"Apple GPU: {_engine_of_a_mac()}")
    else:
        dtype, why = compute_dtype(hardware)
        yield Check("GPU", "note", f"none; the CPU trains in {dtype} ({why})")


def _engine_of_a_mac() -> str:
    from fastft.engines import mlx_is_installed

    if mlx_is_installed():
        return "the mlx engine trains on it; tested on Linux, nobody of us has run it on a Mac"
    return (
        "plain transformers + peft on MPS; pip install 'fastft[mac]' for the mlx engine. Nobody "
        "of us has run either on a Mac"
    )


def check_cuda(
    driver: tuple[int, int] | None, built_for: tuple[int, int] | None
) -> Iterator[Check]:
    """Whether the driver is new enough for the CUDA that torch was built for: the major version
    decides.
    """
    if driver is None or built_for is None:
        return
    (has, _), (needs, _) = driver, built_for
    detail = (
        f"torch is built for {'.'.join(map(str, built_for))}, the driver runs up to "
        f"{'.'.join(map(str, driver))}"
    )
    if has >= needs:
        yield Check("CUDA", "ok", detail)
        return
    wheels = f"https://download.pytorch.org/whl/cu{has}{driver[1]}"
    fix = (
        "install a newer NVIDIA driver, or a torch for this one: pip install torch --index-url "
        f"{wheels}"
    )
    yield Check("CUDA", "blocking", f"{detail}: torch cannot use the card", fix)


def torch_cuda() -> tuple[int, int] | None:
    """Return the CUDA version that torch was built for, read from its files without importing
    it.
    """
    found = importlib.util.find_spec("torch")
    version = Path(found.origin).with_name("version.py") if found and found.origin else None
    text = version.read_text(encoding="utf-8") if version and version.is_file() else ""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", text, re.M)
    return (int(match[1]), int(match[2])) if match else None


def check_memory(hardware: Hardware, path: str | Path) -> Iterator[Check]:
    """RAM and disk that are left."""
    free, total = hardware.ram_free_bytes / GIB, hardware.ram_bytes / GIB
    low = free < 4
    fix = "close other programs; plan with: fastft plan run.yaml" if low else None
    yield Check("RAM", "warning" if low else "ok", f"{free:.1f} of {total:.1f} GiB free", fix)
    disk = hardware.disk_free_bytes(path) / GIB
    status: Status = "blocking" if disk < 0.5 else "warning" if disk < 10 else "ok"
    how = (
        "hf cache ls shows downloaded models, hf cache rm removes them; or set output_dir elsewhere"
    )
    fix = how if disk < 10 else None
    yield Check("disk", status, f"{disk:.1f} GiB free at {path}", fix)


def check_surroundings(
    hardware: Hardware, drive: Path = Path("/content/drive/MyDrive")
) -> Iterator[Check]:
    """Colab and its Drive, WSL2."""
    if hardware.colab:
        if drive.is_dir():
            yield Check(
                "Colab", "ok", f"Drive is mounted; mirror: {drive}/fastft keeps checkpoints"
            )
        else:
            fix = "from google.colab import drive; drive.mount('/content/drive')"
            yield Check(
                "Colab", "warning", "Drive is not mounted: a lost session loses the run", fix
            )
    if hardware.wsl:
        detail = "WSL2: RAM is limited by .wslconfig; files below /mnt/c are slow"
        yield Check(
            "WSL2", "note", detail, "keep runs in the Linux file system, for example ~/runs"
        )


def check_compiler(hardware: Hardware) -> Iterator[Check]:
    """A C++ compiler and cmake: llama-cpp-python is built from source, Triton compiles kernels on
    a GPU.
    """
    compiler = next(
        (found for found in map(shutil.which, ("c++", "g++", "clang++", "cl")) if found), None
    )
    needed = hardware.kind == "cuda" or _version("llama-cpp-python") is None
    fix = {
        "Darwin": "xcode-select --install",
        "Windows": "install the Visual Studio Build Tools",
    }.get(platform.system(), "apt-get install -y build-essential cmake")
    if compiler:
        has_cmake = shutil.which("cmake") is not None
        cmake = "found" if has_cmake else "not found (pip installs its own for a build)"
        tools = f"{compiler}, cmake {cmake}"
        yield Check("compiler", "ok", tools)
    else:
        detail = "no C++ compiler; needed to build llama-cpp-python and for Triton's kernels"
        yield Check("compiler", "warning" if needed else "note", detail, fix)


def check_hub(timeout: float = 4.0) -> Check:
    """Whether the Hub (or HF_ENDPOINT) answers, and whether a token is set."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}:
        return Check("Hub", "note", "HF_HUB_OFFLINE is set: only local folders and the cache")
    token_file = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    token = (
        "with a token" if os.environ.get("HF_TOKEN") or token_file.is_file() else "without a token"
    )
    started = time.monotonic()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(endpoint(), method="HEAD"), timeout=timeout
        ):
            pass
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            return Check(
                "Hub", "warning", f"{shown_endpoint()} answers {error.code}", "try again later"
            )
    except (OSError, ValueError, http.client.HTTPException) as error:
        detail = (
            f"{shown_endpoint()} cannot be reached ({getattr(error, 'reason', error)}): only local "
            "folders and the cache"
        )
        return Check("Hub", "warning", detail, "check the network, a proxy, or HF_ENDPOINT")
    return Check(
        "Hub", "ok", f"{shown_endpoint()} answers in {time.monotonic() - started:.1f} s, {token}"
    )


def check_llama_cpp(hardware: Hardware) -> Check:
    """Whether llama-cpp-python loads (in its own process: a wrong build aborts) and whether it
    uses the GPU.
    """
    name = "llama.cpp"
    if _version("llama-cpp-python") is None:
        return Check(name, "note", "llama-cpp-python is not installed; no GGUF export or chat")
    code = "import llama_cpp; print(bool(llama_cpp.llama_supports_gpu_offload()))"
    build = {"cuda": "-DGGML_CUDA=on", "mps": "-DGGML_METAL=on"}.get(hardware.kind, "")
    environment = f"CMAKE_ARGS='{build}' " if build else ""
    package = f"llama-cpp-python=={TESTED['llama-cpp-python']}"
    fix = (
        f"{environment}pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python "
        f"{package}"
    )
    done = _python(code, timeout=60)
    if done is None or done.returncode != 0:
        reason = "it does not load in 60 s" if done is None else _last_line(done.stderr)
        return Check(name, "warning", f"llama-cpp-python does not load: {reason}", fix)
    offload = done.stdout.strip().endswith("True")
    if build and not offload:
        detail = f"llama-cpp-python works, but was built without the GPU ({hardware.name})"
        return Check(name, "warning", detail, fix)
    return Check(name, "ok", f"llama-cpp-python loads; GPU offload: {'yes' if offload else 'no'}")


def check_kernels(hardware: Hardware) -> Iterator[Check]:
    """Whether fastft's compiled CPU kernels can be used (they are built at first use), or torch's
    operations instead.
    """
    if hardware.kind != "cpu":
        return
    name, instead = "CPU kernels", "torch's element-wise operations instead, with the same results"
    done = _python(
        "from fastft.kernels import native; print('FASTFT ' + native.why_not())", timeout=180
    )
    if done is None or done.returncode != 0:
        reason = "not built in 180 s" if done is None else _last_line(done.stderr)
    else:
        reason = next(
            line for line in done.stdout.splitlines() if line.startswith("FASTFT ")
        ).removeprefix("FASTFT ")
    if not reason:
        yield Check(name, "ok", "compiled for this processor, active")
        return
    fix = "apt-get install -y build-essential" if "compiler" in reason else None
    fix = "unset FASTFT_NATIVE" if "FASTFT_NATIVE" in reason else fix
    yield Check(name, "note", f"fell back: {reason}; {instead}", fix)


# Run in its own process: Unsloth patches whatever process imports it.
_ASK_UNSLOTH = """
import json, sys, warnings, importlib, importlib.util
warnings.simplefilter("ignore")
from fastft.engines import get_engine
engine = get_engine("unsloth")
state = {"reported": engine.patches(), "active": {}, "fell_back": {}}
def note(name, active, why=""):
    state["active" if active else "fell_back"][name] = "" if active else why
backend = state["reported"].get("backend")
import trl, transformers
if backend == "cpu":
    from unsloth_zoo.cpu.runtime import cpu_capabilities
    can = cpu_capabilities()
    why = "no AVX512-BF16, AMX or Arm BF16: float32"
    note("bfloat16 compute", can["bf16"], "" if can["bf16"] else why)
    why = "a trial run of bitsandbytes failed"
    note("NF4 on the CPU", can["bnb_4bit"], "" if can["bnb_4bit"] else why)
    patched = getattr(trl.SFTTrainer, "_unsloth_cpu", False)
    note("SFTTrainer on the CPU", patched, "trl's own trainer is in place")
    loss = getattr(trl.trainer.sft_trainer.SFTTrainer.compute_loss, "_unsloth_cpu", False)
    note("chunked cross entropy", loss, "" if loss else "trl's own loss: whole logits")
    note("Triton kernels", False, "no GPU")
    why = "SDPA would attend across sequences; fastft's own padding-free rows instead"
    note("trl's packing", False, why)
else:
    # What Unsloth itself decided on, not only what is installed: a wheel for another CUDA is
    # there and unusable.
    from unsloth.models import _utils
    from unsloth.utils import attention_dispatch
    flash = getattr(_utils, "HAS_FLASH_ATTENTION", None)
    for name, package, usable, instead in (
        ("FlashAttention 2", "flash_attn", flash, "xformers or SDPA"),
        ("xformers", "xformers", getattr(attention_dispatch, "HAS_XFORMERS", None), "SDPA"),
        ("Triton kernels", "triton", None, "plain torch"),
        ("bitsandbytes", "bitsandbytes", None, "no NF4, no 8-bit AdamW"),
    ):
        found = importlib.util.find_spec(package) is not None
        why = "installed, but Unsloth cannot use it here" if found else "not installed"
        note(name, found if usable is None else bool(usable), f"{why}; {instead} instead")
    trainer = f"{trl.SFTTrainer.__module__}.{trl.SFTTrainer.__name__}"
    note("Unsloth's trainer", "unsloth" in trainer.lower(), f"{trainer} is in place")
print("FASTFT " + json.dumps(state))
"""


def check_unsloth(
    hardware: Hardware, timeout: float = 180.0
) -> tuple[list[Check], dict[str, Any] | None]:
    """Import Unsloth in a process of its own; return the findings, and what is active and what
    fell back.
    """
    name = "Unsloth"
    if _version("unsloth") is None:
        return [], None
    started = time.monotonic()
    done = _python(_ASK_UNSLOTH, timeout=timeout)
    if done is None or done.returncode != 0:
        reason = f"not imported after {timeout:.0f} s" if done is None else _last_line(done.stderr)
        detail = f"cannot be imported: {reason}; training runs on plain transformers + peft"
        return [Check(name, "warning", detail, _UNSLOTH_FIX)], None
    line = next(line for line in done.stdout.splitlines() if line.startswith("FASTFT "))
    state: dict[str, Any] = json.loads(line.removeprefix("FASTFT "))
    reported = state["reported"]
    detail = (
        f"{reported['unsloth']} ({reported['backend']} backend), imported in "
        f"{time.monotonic() - started:.0f} s"
    )
    checks = [Check(name, "ok", detail)]
    early = reported.get("imported_before_unsloth")
    if early:
        fix = "import fastft (or unsloth) before transformers, trl and peft"
        found = f"{early} was imported first: its patches are missing"
        checks.append(Check(f"{name}: import order", "warning", found, fix))
    about = {"unsloth", "backend", "imported_before_unsloth"}
    own = {key: value for key, value in reported.items() if key not in about}
    checks += [Check(f"fastft: {patch}", "ok", str(value)) for patch, value in own.items()]
    checks += [Check(f"{name}: {patch}", "ok", "active") for patch in state["active"]]
    checks += [
        Check(f"{name}: {patch}", "note", f"fell back: {why}")
        for patch, why in state["fell_back"].items()
    ]
    return checks, state


def _python(code: str, timeout: float) -> subprocess.CompletedProcess[str] | None:
    """Run `code` in a fresh interpreter; None where it takes longer than `timeout` seconds."""
    try:
        return subprocess.run(
            child.command("-c", code),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=child.environment(),
        )
    except subprocess.TimeoutExpired:
        return None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
