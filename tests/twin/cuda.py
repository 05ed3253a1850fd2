"""torch.cuda, NVML, autocast and loading as a process with a card sees them."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator
from typing import Any

import torch

from tests.twin.card import LEDGER, STATE
from tests.twin.devices import is_cuda


class Stream:
    """A stream on which everything is done already."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.cuda_stream = self.device_index = self.stream_id = 0
        self.device_type = 1

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> bool:
        return False

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False


class Event:
    """An event that happened when it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.at = time.perf_counter()

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) * 1000


class Selected:
    """torch.cuda.device: there is only one."""

    def __init__(self, device: Any = None) -> None:
        self.idx = 0

    def __enter__(self) -> Selected:
        return self

    def __exit__(self, *error: Any) -> bool:
        return False


def _always(value: Any) -> Any:
    return lambda *args, **kwargs: value


def install() -> None:
    """Patch torch and safetensors in this process."""
    _patch_answers()
    _patch_memory()
    _patch_random()
    _patch_streams()
    _patch_accelerator()
    _patch_autocast()
    _patch_loading()
    torch.nn.Module.cuda = lambda self, device=None: self.to("cuda")  # type: ignore[method-assign]


def _properties() -> types.SimpleNamespace:
    card = STATE.card
    optin = 65_536 if card.capability == (7, 5) else 101_376
    return types.SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], uuid="twin",
        total_memory=card.memory, multi_processor_count=card.multiprocessors, warp_size=32,
        max_threads_per_multi_processor=1024, regs_per_multiprocessor=65_536,
        shared_memory_per_block=49_152, shared_memory_per_block_optin=optin,
        shared_memory_per_multiprocessor=65_536, gcnArchName="", is_integrated=False,
        is_multi_gpu_board=False, L2_cache_size=4 << 20, pci_bus_id=0,
    )  # fmt: skip


def _patch_answers() -> None:
    card, cuda = STATE.card, torch.cuda
    torch.version.cuda = "13.0"
    values = {
        "is_available": True, "device_count": STATE.count, "current_device": 0,
        "get_device_name": card.name, "get_device_capability": card.capability,
        "get_device_properties": _properties(), "is_initialized": True, "_is_compiled": True,
        "synchronize": None, "ipc_collect": None, "set_device": None, "init": None,
        "_lazy_init": None, "set_per_process_memory_fraction": None,
        "get_arch_list": ["sm_75", "sm_80", "sm_86", "sm_90"], "can_device_access_peer": False,
        "is_current_stream_capturing": False, "utilization": 0,
    }  # fmt: skip
    for name, value in values.items():
        setattr(cuda, name, _always(value))
    major = card.capability[0]
    cuda.is_bf16_supported = lambda including_emulation=True: major >= 8 or including_emulation
    torch.backends.cuda.is_built = _always(True)
    for name, value in {
        "_cuda_getCurrentRawStream": 0, "_cuda_getDevice": 0, "_cuda_setDevice": None,
        "_cuda_getDeviceCount": STATE.count, "_cuda_emptyCache": None, "_cuda_synchronize": None,
    }.items():  # fmt: skip
        setattr(torch._C, name, _always(value))


def _patch_memory() -> None:
    cuda = torch.cuda
    names = {"allocated": LEDGER.allocated, "peak": lambda: max(LEDGER.peak, LEDGER.allocated())}
    allocated, peak = (lambda *a, _f=f, **k: _f() for f in names.values())
    for owner in (cuda, cuda.memory, torch.accelerator):
        for name in ("memory_allocated", "memory_reserved"):
            setattr(owner, name, allocated)
        for name in ("max_memory_allocated", "max_memory_reserved"):
            setattr(owner, name, peak)
        for name in ("reset_peak_memory_stats", "reset_max_memory_allocated"):
            setattr(owner, name, lambda *a, **k: LEDGER.reset_peak())

    def empty_cache(*args: Any, **kwargs: Any) -> None:
        STATE.emptied += 1

    cuda.empty_cache = cuda.memory.empty_cache = torch.accelerator.empty_cache = empty_cache
    cuda.mem_get_info = lambda *a, **k: (
        max(0, STATE.card.memory - LEDGER.allocated()),
        STATE.card.memory,
    )
    cuda.memory_stats = _always({})
    cuda.memory_summary, cuda.memory_snapshot = _always(""), _always([])


def _patch_random() -> None:
    cuda = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda s, *a, **k: torch.set_rng_state(s)
    cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    cuda.set_rng_state_all = lambda states: torch.set_rng_state(next(iter(states)))
    cuda.manual_seed = cuda.manual_seed_all = cuda.seed_all = _always(None)
    cuda.initial_seed = _always(0)
    real_fork = torch.random.fork_rng

    @contextlib.contextmanager
    def fork(devices: Any = None, enabled: bool = True, **kwargs: Any) -> Iterator[None]:
        with real_fork(devices=[], enabled=enabled):
            yield

    torch.random.fork_rng = fork
    real = torch.Generator

    class Generator(real):  # type: ignore[valid-type, misc]
        def __new__(cls, device: Any = "cpu") -> Any:
            return real.__new__(cls)

        def __init__(self, device: Any = "cpu") -> None:
            pass

    torch.Generator = Generator  # type: ignore[misc]


def _patch_streams() -> None:
    cuda = torch.cuda
    cuda.Stream = cuda.ExternalStream = Stream  # type: ignore[misc, assignment]
    cuda.Event = Event  # type: ignore[misc, assignment]
    cuda.current_stream = cuda.default_stream = lambda *a, **k: Stream()  # type: ignore[assignment, return-value]
    cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment]
    cuda.set_stream = _always(None)
    cuda.device = cuda.device_of = Selected  # type: ignore[misc, assignment]


def _patch_accelerator() -> None:
    torch.accelerator.is_available = _always(True)
    torch.accelerator.current_accelerator = _always(torch.device("cuda"))
    torch.accelerator.device_count = _always(STATE.count)
    torch.accelerator.current_device_index = _always(0)
    torch.accelerator.synchronize = _always(None)
    torch.accelerator.current_stream = lambda *a, **k: Stream()


def _patch_autocast() -> None:
    """Mixed precision "on cuda" is the CPU's, which computes the tensors."""

    def mapped(f: Any) -> Any:
        def g(device_type: Any = None, *rest: Any) -> Any:
            if device_type is None or device_type == "cuda":
                return f("cpu", *rest)
            return f(device_type, *rest)

        return g

    for name in (
        "is_autocast_enabled",
        "get_autocast_dtype",
        "set_autocast_enabled",
        "set_autocast_dtype",
    ):
        setattr(torch, name, mapped(getattr(torch, name)))
    torch.get_autocast_gpu_dtype = lambda: torch.get_autocast_dtype("cpu")


def _patch_loading() -> None:
    import safetensors
    import safetensors.torch

    real_open, real_load = safetensors.safe_open, torch.load

    class SafeOpen:
        """safetensors reads straight onto a device in Rust; here through the CPU."""

        def __init__(
            self, filename: Any, framework: str = "pt", device: Any = "cpu", **kwargs: Any
        ) -> None:
            self.on_card = is_cuda(device)
            self.file = real_open(
                filename, framework=framework, device="cpu" if self.on_card else device, **kwargs
            )

        def __enter__(self) -> SafeOpen:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self.file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            tensor = self.file.get_tensor(name)
            return tensor.to("cuda") if self.on_card else tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    safetensors.safe_open = safetensors.torch.safe_open = SafeOpen

    def load(file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        if not is_cuda(map_location):
            return real_load(file, map_location=map_location, **kwargs)
        values = real_load(file, map_location="cpu", **kwargs)
        return torch.utils._pytree.tree_map(
            lambda v: v.to("cuda") if isinstance(v, torch.Tensor) else v, values
        )

    torch.load = load
