"""An importance matrix from the user's own data: how strongly each input of each linear layer is
used.

llama.cpp weighs the rounding error of a weight by the mean square of the activation that it is
multiplied with. A fine-tuned model is best measured on what it was tuned on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import FastFTError
from fastft.families import gguf_arch, text_name
from fastft.files import written_aside

if TYPE_CHECKING:
    import numpy as np
    import torch


def collect_imatrix(model: Any, batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """Return {GGUF tensor name: mean of the squared inputs, float32 (inputs of the layer,)}.

    `model`: a transformers causal LM, or a peft model around one. `batches`: token ids, each a
    list or a tensor of shape (tokens,) or (sequences, tokens) without padding. The matrix weighs
    columns as llama.cpp's own `llama-imatrix` does (sum of squares over tokens, divided by their
    number). Raises FastFTError where no token was seen.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    tokens = 0
    was_training = model.training
    model.eval()
    try:
        with measured(model, sums), torch.no_grad():
            for batch in batches:
                ids = torch.as_tensor(batch, dtype=torch.long, device=model.device).reshape(
                    -1, _width(batch)
                )
                tokens += ids.numel()
                model(input_ids=ids)
    finally:
        model.train(was_training)
    if tokens == 0:
        raise FastFTError("an importance matrix needs data, but no token was given.")
    names = gguf_names(model, list(sums))
    return {
        names[name]: (total / tokens).float().numpy()
        for name, total in sums.items()
        if name in names
    }


def _width(batch: Any) -> int:
    import torch

    return torch.as_tensor(batch).shape[-1]


@contextmanager
def measured(model: Any, sums: dict[str, torch.Tensor]) -> Iterator[None]:
    """While inside, add up the squared inputs of every linear layer under the checkpoint's name of
    its weight.
    """
    handles = []
    for name, layer in weight_layers(model):

        def add(_: Any, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            squares = (
                inputs[0].detach().double().square().reshape(-1, inputs[0].shape[-1]).sum(0).cpu()
            )
            sums[name] = sums[name] + squares if name in sums else squares

        handles.append(layer.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weight_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (weight name in the checkpoint, module) of each linear layer.

    Of a peft layer it is the frozen inner layer: it sees the same inputs as the merged weight will.
    """
    import torch

    for name, module in model.named_modules():
        parts = name.split(".")
        if not isinstance(module, torch.nn.Linear) or {"lora_A", "lora_B"} & set(parts):
            continue
        if "base_layer" in parts:
            parts.remove("base_layer")
        yield ".".join(parts).removeprefix("base_model.model.") + ".weight", module


def gguf_names(model: Any, names: list[str]) -> dict[str, str]:
    """Return {checkpoint name: GGUF tensor name} of those weights that have one.

    A tied output layer is the embedding table, which llama.cpp quantises under that name; it looks
    the importance up by tensor name, so the head's inputs are what counts for it.
    """
    import gguf

    config = model.config.get_text_config()
    wrapped = config is not model.config
    model_type = config.model_type
    arch = gguf_arch(model_type)
    enum = next((member for member, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if enum is None:
        raise FastFTError(
            f"an importance matrix cannot be collected for {model_type}: llama.cpp's names "
            "are not known."
        )
    table = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    own = {name: text_name(name) if wrapped else name for name in names}
    found = {
        name: table.get_name(text, try_suffixes=(".weight",)) for name, text in own.items() if text
    }
    tied = model.config.tie_word_embeddings
    return {
        name: "token_embd.weight" if tied and new == "output.weight" else new
        for name, new in found.items()
        if new
    }


def save_imatrix(path: Path | str, imatrix: dict[str, np.ndarray]) -> Path:
    """Write the matrix as .npz, one float32 array a tensor, whole or not at all."""
    import numpy as np

    path = Path(path)
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, **imatrix)  # type: ignore[arg-type]
    return path


def refuse_foreign(path: Path) -> None:
    """Raise FastFTError where `path`, which is to be written, is there and no importance matrix."""
    if path.is_symlink() or path.exists():
        try:
            load_imatrix(path)
        except FastFTError as error:
            raise FastFTError(
                f"{path} would be replaced, but was not written by fastft. Move it away, or choose "
                "another --out."
            ) from error


def load_imatrix(path: Path | str) -> dict[str, np.ndarray]:
    """Return what `save_imatrix` wrote; raises FastFTError where the file is something else."""
    import zipfile

    import numpy as np

    wrong = FastFTError(
        f"{path} is no importance matrix of fastft (an .npz file of one row of numbers a tensor). "
        "Write one with: fastft export RUN --to gguf:TYPE --imatrix auto"
    )
    if not zipfile.is_zipfile(path):
        raise wrong
    try:
        with np.load(path, allow_pickle=False) as data:
            found = {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, MemoryError) as error:
        raise wrong from error
    for values in found.values():
        if values.ndim != 1 or values.dtype.kind != "f" or not np.isfinite(values).all():
            raise wrong
    return found
