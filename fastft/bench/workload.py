"""The work that every arm does: a checkpoint, a starting adapter, and pre-tokenised sequences in a
fixed order.

Made once for an invocation, in a process of its own; the arms only read it. Weights and tokens are
random: what a step costs does not depend on what the numbers mean, and nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastft.bench.case import Case, Lengths, Shared
from fastft.errors import FastFTError

# the data never holds PAD, so that padding can be told apart
PAD, BOS, EOS, FIRST_TOKEN = (0, 1, 2, 3)
NEW_TOKENS = 64
"""Room for tokens that a library adds to a real model's vocabulary to pad with."""
SHARD = 2 * 10**9
"""Bytes of a file of a made-up model: what is in memory at once while it is written."""


@dataclass(frozen=True)
class Workload:
    """Sequences in the order in which they are trained, `effective_batch_size` a step."""

    input_ids: list[np.ndarray]
    labels: list[np.ndarray]
    effective_batch_size: int
    never: np.ndarray = field(default_factory=lambda: np.array([PAD]))
    """Ids that no sequence holds: what goes into a model with one of these is padding, whichever a
    library pads with.
    """

    def step(self, index: int) -> slice:
        """Return the slice of sequences of step `index`."""
        return slice(index * self.effective_batch_size, (index + 1) * self.effective_batch_size)

    def tokens(self, index: int) -> int:
        """Return the tokens of step `index`, without padding."""
        return sum(len(ids) for ids in self.input_ids[self.step(index)])

    def supervised(self, index: int) -> int:
        """Return the tokens of step `index` that carry loss (the first of a sequence is predicted
        by nothing).
        """
        return sum(int((labels[1:] != -100).sum()) for labels in self.labels[self.step(index)])

    def parts(self, index: int) -> list[tuple[int, int]]:
        """Return (length, beginning) of each sequence of step `index`: its tokens, and how many of
        its first ones another sequence of the step begins with as well. Length less beginning,
        summed, is what a step has to compute at least.
        """
        # In lexical order the longest common beginning is the neighbour's.
        ordered = sorted(self.input_ids[self.step(index)], key=lambda ids: ids.tolist())
        common = [_common(a, b) for a, b in pairwise(ordered)]
        return list(zip(map(len, ordered), [0, *common], strict=True))

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.input_ids) // self.effective_batch_size


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens two sequences begin with together."""
    size = min(len(a), len(b))
    other = np.flatnonzero(a[:size] != b[:size])
    return int(other[0]) if len(other) else size


def draw_lengths(lengths: Lengths, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return `count` sequence lengths in tokens, (count,) int64."""
    if lengths.fixed is not None:
        return np.full(count, lengths.fixed)
    if lengths.file is not None:
        try:
            found = np.array([int(line) for line in Path(lengths.file).read_text("utf-8").split()])
        except (OSError, ValueError) as error:
            raise FastFTError(
                f"lengths.file {lengths.file}: {error}; it must hold one whole number a line."
            ) from error
        if not len(found):
            raise FastFTError(
                f"lengths.file {lengths.file} is empty; it must hold one whole number a line."
            )
        drawn = rng.choice(found, count)
    else:
        assert lengths.median is not None
        drawn = rng.lognormal(np.log(lengths.median), lengths.sigma, count).round().astype(np.int64)
    return np.clip(drawn, lengths.shortest, lengths.longest)


def draw(
    case: Case,
    lengths: Lengths,
    effective_batch_size: int,
    vocab_size: int,
    never: Sequence[int] = (PAD, BOS, EOS),
) -> Workload:
    """Return the case's sequences: seeded, so the same on every machine (numpy's PCG64), without
    the ids in `never`.
    """
    rng = np.random.default_rng(case.seed)
    ordinary = np.setdiff1d(np.arange(vocab_size), never)
    if not len(ordinary):
        raise FastFTError(f"case {case.name}: a vocabulary of {vocab_size} has no ordinary token.")
    count = (case.warmup_steps + case.steps) * effective_batch_size
    if lengths.shared is not None:
        sequences = draw_shared(lengths.shared, count, ordinary, rng)
        return Workload(*sequences, effective_batch_size, np.array(sorted(never)))
    input_ids, labels = [], []
    for length in draw_lengths(lengths, count, rng):
        ids = ordinary[rng.integers(len(ordinary), size=length)]
        target = ids.copy()
        # the last token carries loss
        target[: min(max(1, round(lengths.prompt_share * length)), length - 1)] = -100
        input_ids.append(ids)
        labels.append(target)
    return Workload(input_ids, labels, effective_batch_size, np.array(sorted(never)))


def draw_shared(
    shared: Shared, count: int, ordinary: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return (input_ids, labels) of `count` sequences that share beginnings, of the ids in
    `ordinary`.
    """

    def tokens(length: int) -> np.ndarray:
        return ordinary[rng.integers(len(ordinary), size=length)]

    input_ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    before = tokens(0)
    for place in range(count):
        if place % (shared.group or count) == 0:
            before = tokens(shared.beginning)
        asked = np.concatenate([before, tokens(shared.prompt)])
        thought, answer = tokens(shared.thought), tokens(shared.answer)
        ids = np.concatenate([asked, thought, answer])
        input_ids.append(ids)
        labels.append(np.where(np.arange(len(ids)) < len(asked), -100, ids))
        if shared.turns:
            before = np.concatenate([asked, answer])
    return input_ids, labels


def save(workload: Workload, path: Path) -> None:
    """Write the sequences as one .npz (concatenated, with their lengths)."""
    np.savez(
        path,
        ids=np.concatenate(workload.input_ids),
        labels=np.concatenate(workload.labels),
        lengths=np.array([len(ids) for ids in workload.input_ids]),
        batch=workload.effective_batch_size,
        never=workload.never,
    )


def load(path: Path) -> Workload:
    """Read what `save` wrote."""
    with np.load(path) as data:
        cuts = np.cumsum(data["lengths"])[:-1]
        ids, labels = np.split(data["ids"], cuts), np.split(data["labels"], cuts)
        return Workload(ids, labels, int(data["batch"]), data["never"])


def make_checkpoint(case: Case, folder: Path, *, layers: int | None = None) -> int:
    """Write the case's random-weight model, tokenizer and starting adapter; return the
    vocabulary's size.

    `layers` cuts the depth (for parity of models too large for float32). Needs torch: run in a
    worker process.
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
    # as published models are stored
    dtype = torch.float32 if case.dtype == "float32" else torch.bfloat16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    device = _device_with_room(sum(p.numel() * p.element_size() for p in model.parameters()))
    torch.manual_seed(case.seed)
    if device is not None:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.pad_token_id = PAD
    if device is not None:
        model.save_pretrained(folder, max_shard_size=SHARD)
    else:
        save_in_parts(model, folder)
    _tokenizer(config.vocab_size).save_pretrained(folder)
    write_starting_adapter(model, case, folder / "start.safetensors")
    return int(config.vocab_size)


def _device_with_room(size: int) -> str | None:
    """Return where a model of `size` bytes can be made whole and saved, or None (8B in bfloat16 on
    a Colab T4).
    """
    import psutil
    import torch

    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.1 * size:
        return "cuda"
    # saving copies a shard
    return "cpu" if psutil.virtual_memory().available > 2.2 * size else None


def save_in_parts(model: Any, folder: Path, shard: int = SHARD) -> None:
    """Write a model that is on the meta device, one module in memory at a time, with its family's
    own initialisation.
    """
    import torch
    from safetensors.torch import save_file

    wanted = {name for name, _ in model.named_parameters()}  # tied ones once
    where: dict[str, int] = {}
    part: dict[str, Any] = {}
    parts = total = 0
    for prefix, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if not own:
            continue
        with torch.no_grad():
            model._init_weights(module.to_empty(device="cpu", recurse=False))
        for name in own:
            full = f"{prefix}.{name}" if prefix else name
            if full in wanted:
                part[full] = getattr(module, name).detach().clone()
        module.to_empty(device="meta", recurse=False)
        where |= dict.fromkeys(part, parts)
        if sum(t.numel() * t.element_size() for t in part.values()) > shard:
            save_file(part, folder / f"part-{parts}.safetensors", metadata={"format": "pt"})
            total, parts, part = (
                total + sum(t.numel() * t.element_size() for t in part.values()),
                parts + 1,
                {},
            )
    if part:
        save_file(part, folder / f"part-{parts}.safetensors", metadata={"format": "pt"})
        total, parts = total + sum(t.numel() * t.element_size() for t in part.values()), parts + 1
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    for i, name in enumerate(names):
        (folder / f"part-{i}.safetensors").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[i] for name, i in where.items()},
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=1), encoding="utf-8"
    )
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def parameters_of(path: Path) -> int:
    """Return the number of parameters in a safetensors file, from its header alone."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def write_starting_adapter(model: Any, case: Case, path: Path) -> None:
    """Write one A and B for each targeted layer: B is not zero, so that A has a gradient from the
    first step on.
    """
    import torch
    from peft import get_peft_model
    from safetensors.torch import save_file

    adapted = get_peft_model(model, lora_config(case))
    generator = torch.Generator().manual_seed(case.seed)
    tensors = {}
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            spread = weight.shape[1] ** -0.5 if "lora_A" in name else 0.02
            tensors[plain_name(name)] = torch.randn(weight.shape, generator=generator) * spread
    save_file(tensors, path)


def lora_config(case: Case) -> Any:
    """Return peft's settings of the case's adapter."""
    from peft import LoraConfig

    lora = case.lora
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def plain_name(name: str) -> str:
    """Return a LoRA parameter's name without what peft's wrappers and adapter names add."""
    for part in ("base_model.model.", ".default", "_orig_mod.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


def _tokenizer(vocab_size: int) -> Any:
    """A word-level tokenizer of the model's size: trainers want one for padding, no text is ever
    tokenised.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {
        f"t{i}": i for i in range(FIRST_TOKEN, vocab_size)
    }
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def main() -> None:
    """Make what a job file asks for: [{"case", "folder", "layers"}]; used by the runner."""
    from fastft.bench.process import end_with_the_runner

    end_with_the_runner()
    for job in json.loads(Path(sys.argv[1]).read_text("utf-8")):
        case, folder = Case.model_validate(job["case"]), Path(job["folder"])
        never = [PAD, BOS, EOS]
        if case.model.id is None or job["layers"] is not None:
            vocab_size = make_checkpoint(case, folder, layers=job["layers"])
        else:
            vocab_size, never = _use_real_model(case, folder)
        for table, settings in case.tables.items():
            batch = settings.effective_batch_size or case.effective_batch_size
            save(
                draw(case, settings.lengths or case.lengths, batch, vocab_size, never),
                folder / f"{table}.npz",
            )


def _use_real_model(case: Case, folder: Path) -> tuple[int, list[int]]:
    """Write only the starting adapter beside a real model, from its config alone.

    Returns the vocabulary's size and the ids that no sequence may hold: every special or added
    token, and those past the tokenizer's end, because each library pads with another one of them.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(str(case.model.id))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    write_starting_adapter(model, case, folder / "start.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(str(case.model.id))
    vocab_size = int(config.get_text_config().vocab_size)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return vocab_size, sorted({*special, *range(len(tokenizer), vocab_size + NEW_TOKENS)})


if __name__ == "__main__":
    main()
