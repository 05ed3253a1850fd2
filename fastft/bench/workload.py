"""The work that every arm does: a checkpoint, a starting adapter, and pre-tokenised sequences in a fixed order.

Made once for an invocation, in a process of its own; the arms only read it. Weights and tokens are random: what a
step costs does not depend on what the numbers mean, and nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastft.bench.case import Case, Lengths
from fastft.errors import FastFTError

PAD, BOS, EOS, FIRST_TOKEN = 0, 1, 2, 3  # the data never holds PAD, so that padding can be told apart


@dataclass(frozen=True)
class Workload:
    """Sequences in the order in which they are trained, `effective_batch_size` a step."""

    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    effective_batch_size: int

    def step(self, index: int) -> slice:
        """Return the slice of sequences of step `index`."""
        return slice(index * self.effective_batch_size, (index + 1) * self.effective_batch_size)

    def tokens(self, index: int) -> int:
        """Return the tokens of step `index`, without padding."""
        return sum(len(ids) for ids in self.input_ids[self.step(index)])

    def supervised(self, index: int) -> int:
        """Return the tokens of step `index` that carry loss (the first of a sequence is predicted by nothing)."""
        return sum(int((labels[1:] != -100).sum()) for labels in self.labels[self.step(index)])

    def lengths(self, index: int) -> list[int]:
        """Return the lengths of the sequences of step `index`."""
        return [len(ids) for ids in self.input_ids[self.step(index)]]

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.input_ids) // self.effective_batch_size


def draw_lengths(lengths: Lengths, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` sequence lengths in tokens, (count,) int64."""
    if lengths.fixed is not None:
        return np.full(count, lengths.fixed)
    if lengths.file is not None:
        try:
            found = np.array([int(line) for line in Path(lengths.file).read_text("utf-8").split()])
        except (OSError, ValueError) as error:
            raise FastFTError(f"lengths.file {lengths.file}: {error}; it must hold one whole number a line.") from error
        if not len(found):
            raise FastFTError(f"lengths.file {lengths.file} is empty; it must hold one whole number a line.")
        drawn = rng.choice(found, count)
    else:
        assert lengths.median is not None
        drawn = rng.lognormal(np.log(lengths.median), lengths.sigma, count).round().astype(np.int64)
    return np.clip(drawn, lengths.shortest, lengths.longest)


def draw(case: Case, lengths: Lengths, effective_batch_size: int, vocab_size: int) -> Workload:
    """Return the case's sequences: seeded, so the same on every machine (numpy's PCG64)."""
    rng = np.random.default_rng(case.seed)
    count = (case.warmup_steps + case.steps) * effective_batch_size
    input_ids, labels = [], []
    for length in draw_lengths(lengths, count, rng):
        ids = rng.integers(FIRST_TOKEN, vocab_size, length)
        target = ids.copy()
        target[: max(1, round(lengths.prompt_share * length))] = -100
        input_ids.append(ids)
        labels.append(target)
    return Workload(input_ids, labels, effective_batch_size)


def save(workload: Workload, path: Path) -> None:
    """Write the sequences as one .npz (concatenated, with their lengths)."""
    np.savez(
        path,
        ids=np.concatenate(workload.input_ids),
        labels=np.concatenate(workload.labels),
        lengths=np.array([len(ids) for ids in workload.input_ids]),
        batch=workload.effective_batch_size,
    )


def load(path: Path) -> Workload:
    """Read what `save` wrote."""
    with np.load(path) as data:
        cuts = np.cumsum(data["lengths"])[:-1]
        return Workload(np.split(data["ids"], cuts), np.split(data["labels"], cuts), int(data["batch"]))


def make_checkpoint(case: Case, folder: Path, *, layers: int | None = None) -> int:
    """Write the case's random-weight model, tokenizer and starting adapter; return the vocabulary's size.

    `layers` cuts the depth (for parity of models too large for float32). Needs torch: run in a worker process.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if case.model.family is not None:
        config = AutoConfig.for_model(case.model.family, **case.model.config)
    else:
        config = AutoConfig.from_pretrained(str(case.model.id))
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = BOS, EOS, PAD
    torch.manual_seed(case.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16  # as published models are stored
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    write_starting_adapter(model, case, folder / "start.safetensors")
    return int(config.vocab_size)


def write_starting_adapter(model: Any, case: Case, path: Path) -> None:
    """Write one A and B for each targeted layer: B is not zero, so that A has a gradient from the first step on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    lora = LoraConfig(r=case.lora.r, lora_alpha=case.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(case.seed)
    tensors = {}
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            spread = weight.shape[1] ** -0.5 if "lora_A" in name else 0.02
            tensors[plain_name(name)] = torch.randn(weight.shape, generator=generator) * spread
    save_file(tensors, path)


def plain_name(name: str) -> str:
    """Return a LoRA parameter's name without what peft's wrappers and adapter names add."""
    for part in ("base_model.model.", ".default", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


def _tokenizer(vocab_size: int) -> Any:
    """A word-level tokenizer of the model's size: trainers want one for padding, no text is ever tokenised."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {f"t{i}": i for i in range(FIRST_TOKEN, vocab_size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main() -> None:
    """Make what a job file asks for: [{"case", "folder", "layers"}]; used by the runner."""
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        case, folder = Case.model_validate(job["case"]), Path(job["folder"])
        if case.model.id is None or job["layers"] is not None:
            vocab_size = make_checkpoint(case, folder, layers=job["layers"])
        else:
            vocab_size = _use_real_model(case, folder)
        for table, settings in case.tables.items():
            batch = settings.effective_batch_size or case.effective_batch_size
            save(draw(case, settings.lengths or case.lengths, batch, vocab_size), folder / f"{table}.npz")


def _use_real_model(case: Case, folder: Path) -> int:
    """Write only the starting adapter beside a real model, from its config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(str(case.model.id))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    write_starting_adapter(model, case, folder / "start.safetensors")
    return int(config.get_text_config().vocab_size)


if __name__ == "__main__":
    main()
