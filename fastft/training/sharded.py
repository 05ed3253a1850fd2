"""A frozen base spread over the processes of a run: torch's FSDP2, for what one card cannot hold.

Each process keeps its part of every layer's weights, and puts a layer together for as long as it
computes with it. The adapter is whole in every process (`ignored_params`): its gradients are
ordinary tensors, summed by `ranks.add_up` as always, so there is no averaging to undo, and
optimizer, clipping, checkpoints and final/ do not know of it.

Putting a layer together needs every process at the same moment. So all make equally many forward
passes (`passes_needed`), evaluate the same sequences, and none retries by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastft.data.batches import Rows, Segment, row_sizes
from fastft.training import ranks

MARK = "_fastft_sharded"


def shard(model: Any, device: str) -> None:
    """Spread the frozen weights of the peft model `model` over the processes, layer by layer, onto
    `device` (cpu or cuda).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (ranks.world().size,))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)  # FSDP2 moves only what it spreads
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(model, mesh=mesh, ignored_params=trained)
    setattr(model, MARK, True)


def is_sharded(model: Any) -> bool:
    """Whether `shard` was given this model."""
    return bool(getattr(model, MARK, False))


def decoder_layers(model: Any) -> list[Any]:
    """Return the layers of a decoder: the longest list of modules in it."""
    import torch

    lists = [list(m) for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def put_down(model: Any) -> None:
    """Have every process hold its part alone again; after passes that no backward pass follows.

    Their last layers stay together, and saving, which the first process does, would take them
    apart in it alone.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def passes_needed(
    segments: Sequence[Segment], budget: int, rows: Rows, rope_changes_at: int | None = None
) -> int:
    """Return how many forward passes the process with the most of them makes in a step.

    Every process works it out from the whole step, so nothing is sent.
    """
    shares = ranks.split(segments, ranks.world().size, trie=rows == "trie")
    return max(len(row_sizes(share, budget, rows, rope_changes_at)) for share in shares)


def local_bytes(model: Any) -> int:
    """Return the bytes of weights that lie in this process between two passes."""
    found = 0
    for parameter in model.parameters():
        part = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        found += part.numel() * part.element_size()
    return found
