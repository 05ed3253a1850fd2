"""Turn this process into one that has a CUDA card: `install("t4")` before torch's users are imported.

The CUDA branches of Unsloth, bitsandbytes, transformers, accelerate and fastft then run for real,
on CPU tensors that say they are on `cuda:0`. What it cannot show: timings, streams that overlap,
CUDA graphs, compiled kernels, and rounding of tensor cores.
"""

from __future__ import annotations

import os
import sys

from tests.twin.card import CARDS, STATE


def install(card: str = "t4", count: int = 1, *, interpret_rope: bool = False) -> None:
    """Pretend that this process has `count` cards of the kind `card` (a key of CARDS)."""
    assert "unsloth" not in sys.modules, "the twin must be installed before Unsloth is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    STATE.card, STATE.count = CARDS[card], count
    os.geteuid = lambda: 1000  # Unsloth runs ldconfig where it is root
    from tests.twin import cuda, devices, kernels

    kernels.install_bitsandbytes()  # it looks for a GPU when it is imported
    cuda.install()
    kernels.install(interpret_rope=interpret_rope)
    _answer_for_the_driver()
    devices.install()


def _answer_for_the_driver() -> None:
    """NVML, as fastft.hardware reads it: 300 MiB more than torch sees, 500 MiB of it taken."""
    import fastft.hardware as hardware

    card = STATE.card
    seen = hardware.NvidiaCard(
        card.name,
        card.memory + 300 * 2**20,
        card.memory - 200 * 2**20,
        card.capability,
        "580.00",
        (13, 0),
    )
    hardware.nvidia_gpus = lambda: [seen] * STATE.count
    hardware._torch_without_cuda = lambda: None
