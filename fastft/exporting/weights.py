"""The weights of the trained model: a base checkpoint plus an adapter, read lazily, added in
float32.

Nothing here builds a model. A tensor is read when it is asked for, whole or some rows of it, so
the peak memory of an export is what the caller holds. Merging follows peft's own arithmetic
(`lora.Linear.get_delta_weight`, `DoraLinearLayer`, `TrainableTokensLayer`), which the tests
compare with.
"""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import files, hub
from fastft.data.bounded import matches
from fastft.errors import FastFTError
from fastft.exporting.experts import PARTS, single
from fastft.families import family_of
from fastft.models import FLOATS, check_finite, read_header

if TYPE_CHECKING:
    import torch

DTYPES = FLOATS | {"U8": "uint8", "I64": "int64"}
PREFIX = "base_model.model."
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
ROWS = 4096
"""Rows of the embedding that are compared with the head's at a time."""
# Parts of the same model whose modules and checkpoint tensors are named differently by
# transformers.
RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("", "language_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
# These initialisations move part of the base weights into A and B, so W + s B A needs the moved
# base as well.
MOVING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Checkpoint:
    """The safetensors of a folder, one file or many, read by position: no mapping, no pickle.

    `names` are in file order. Raises FastFTError for pickle weights, missing shards and truncated
    files.
    """

    def __init__(self, folder: Path, pattern: str = "model*.safetensors"):
        self.folder = Path(folder)
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in self._files(pattern):
            entries, start = read_header(path)
            self._where |= {name: (path, start, entry) for name, entry in entries.items()}

    def _files(self, pattern: str) -> list[Path]:
        index = self.folder / (pattern.replace("*", "") + ".index.json")
        if index.is_file():
            shards = files.read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(f, str) for f in shards.values()):
                raise FastFTError(f"{index} names no weight files. Download the model again.")
            wanted = sorted(set(shards.values()))
            missing = [name for name in wanted if not (self.folder / name).is_file()]
            if missing:
                raise FastFTError(
                    f"{self.folder} lacks {len(missing)} of {len(wanted)} weight files: "
                    f"{', '.join(missing[:5])}. "
                    "Download the model again."
                )
            return [self.folder / name for name in wanted]
        found = sorted(self.folder.glob(pattern)) or sorted(
            self.folder.glob("consolidated*.safetensors")
        )
        if not found:
            pickles = [
                p.name for ext in ("*.bin", "*.pt", "*.pth") for p in sorted(self.folder.glob(ext))
            ]
            if pickles:
                raise FastFTError(
                    f"{self.folder} holds pickle weights only ({', '.join(pickles[:3])}), "
                    "which can run code when "
                    "loaded. Use a revision with safetensors, or convert it where you trust it."
                )
            raise FastFTError(
                f"{self.folder} holds no {pattern}: it is not a model folder with safetensors "
                "weights."
            )
        return found

    @property
    def names(self) -> list[str]:
        """Every tensor's name, in file order."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of tensor `name`."""
        return tuple(self._where[name][2]["shape"])

    def dtype(self, name: str) -> str:
        """Return the stored dtype of `name` in torch's words, such as "bfloat16"."""
        code = self._where[name][2]["dtype"]
        if code not in DTYPES:
            raise FastFTError(
                f"tensor {name} in {self.folder} is stored as {code}; known: {', '.join(DTYPES)}."
            )
        return DTYPES[code]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return `name`, or some leading rows of it, in its stored dtype."""
        import torch

        path, start, entry = self._where[name]
        shape = list(entry["shape"])
        begin, end = entry["data_offsets"]
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            row_bytes = (end - begin) // shape[0]
            begin, end = begin + first * row_bytes, begin + last * row_bytes
            shape[0] = last - first
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        with open(path, "rb", buffering=0) as file:
            file.seek(start + begin)
            view = memoryview(buffer.numpy().data)
            while view:  # one read returns at most 2 GiB
                got = file.readinto(view)
                if not got:
                    raise FastFTError(
                        f"{path} ends inside tensor {name}: it is truncated. Download it again."
                    )
                view = view[got:]
        return buffer.view(getattr(torch, self.dtype(name))).reshape(shape)


@dataclass(frozen=True)
class Experts:
    """Which experts a LoRA on their parameter means for one tensor of the base (peft's
    `target_parameters`): A is (experts x r, inputs), B (outputs, r x experts).
    """

    number: int
    layout: str
    """as `Family.experts` has it"""
    only: int | None = None
    """the one expert whose matrix the tensor is; None: the tensor holds all of them"""
    part: str = ""
    """that matrix: gate_proj, up_proj or down_proj"""


@dataclass
class Change:
    """What the adapter does to one tensor; the fields name tensors in the adapter's file."""

    replace: str | None = None
    """a whole new tensor: modules_to_save, resized embeddings, trained biases"""
    lora: tuple[str, str] | None = None
    """A and B: W + scale * B A; for an embedding W + scale * (B A)^T"""
    embedding: bool = False
    scale: float = 1.0
    magnitude: str | None = None
    """DoRA's length of each row (arXiv 2402.09353, equation 5)"""
    row_values: str | None = None
    """trained rows, which stand in place of the rows `row_indices`"""
    row_indices: tuple[int, ...] = ()
    add: str | None = None
    """lora_bias: bias + scale * B's bias"""
    experts: Experts | None = None


class Weights:
    """The trained model's tensors by their name in the base checkpoint.

    `tensor(name, rows)` is W + delta in float32, shape as in `shape(name)`; `changed` says which
    tensors the adapter touches. `config` is the base's config.json with the trained vocabulary
    size and tying. Where the adapter trained tied embeddings apart, as peft does for
    modules_to_save on one of the two, `lm_head.weight` appears as a tensor of its own and
    `config["tie_word_embeddings"]` is False.

    Raises FastFTError: not a LoRA adapter, an adapter of another base (all mismatches at once), a
    quantised base (with the fix; `dequantize=True` merges onto dequantised bitsandbytes weights
    instead), fan_in_fan_out, experts of a family that is not known, initialisations that moved the
    base's weights.
    """

    def __init__(self, base: Path, adapter: Path | None = None, *, dequantize: bool = False):
        self.base = Path(base)
        self.adapter = Path(adapter) if adapter else None
        self.config = read_json(self.base, "config.json")
        self._quantized = _check_quantization(self.base, self.config, dequantize)
        self._checkpoint = Checkpoint(self.base)
        self._dequantized: tuple[str, Any] | None = None
        self._last_b: tuple[str, torch.Tensor] | None = None
        self._lock = threading.Lock()
        self.changed: dict[str, Change] = {}
        self._names = [n for n in self._checkpoint.names if not _is_quantization_state(n)]
        self._settle_stored_head()
        self._base_tied = self._is_tied()
        if self.adapter:
            self.adapter_config = read_json(self.adapter, "adapter_config.json")
            self._adapter = Checkpoint(self.adapter, "adapter_model.safetensors")
            _check_adapter_kind(self.adapter, self.adapter_config)
            check_finite(self.adapter / "adapter_model.safetensors")
            self.changed = self._read_changes()
            self._settle_tying()
            self._check_shapes()
            self._settle_vocabulary()

    @property
    def names(self) -> list[str]:
        """Every tensor's name, in the base's order."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the merged tensor's shape."""
        change = self.changed.get(name)
        if change and change.replace:
            return self._adapter.shape(change.replace)
        source = self._source(name)
        if self._quantized and self._checkpoint.dtype(source) == "uint8":
            return tuple(self._dequantize(source).shape)
        return self._checkpoint.shape(source)

    def dtype(self, name: str) -> str:
        """Return the dtype that the base stores `name` in, such as "bfloat16"."""
        stored = self._checkpoint.dtype(self._source(name))
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        return str(said) if stored == "uint8" else stored

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return W + delta in float32, or some rows of it."""
        change = self.changed.get(name) or Change()
        if change.replace:
            weight = self._adapter.read(change.replace, rows).float()
        else:
            weight = self._base_tensor(self._source(name), rows).float()
        if change.lora:
            weight = self._add_lora(weight, change, rows)
        if change.row_values:
            weight = self._replace_rows(weight, change, rows)
        if change.add:
            weight = weight + self._adapter.read(change.add, rows).float() * change.scale
        return weight

    def lora_part(self, name: str) -> torch.Tensor:
        """Return one of the adapter's own tensors, as `changed` names them, in float32."""
        return self._adapter.read(name).float()

    @property
    def base_is_tied(self) -> bool:
        """Whether the base uses its embedding as its head."""
        return self._base_tied

    def _source(self, name: str) -> str:
        """The checkpoint tensor that `name` starts from: its own, or for a head that was tied, the
        embedding.
        """
        return name if name in self._checkpoint else self._embedding_name()

    def _base_tensor(self, name: str, rows: slice | None) -> torch.Tensor:
        if self._quantized and self._checkpoint.dtype(name) == "uint8":
            whole = self._dequantize(name)
            return whole if rows is None else whole[rows]
        return self._checkpoint.read(name, rows)

    def _add_lora(self, weight: torch.Tensor, change: Change, rows: slice | None) -> torch.Tensor:
        import torch

        assert change.lora is not None
        name_a, name_b = change.lora
        if change.experts:
            return weight + self._expert_delta(change, weight.shape, rows) * change.scale
        if change.embedding:  # A (r, vocabulary), B (hidden, r)
            a = self._adapter.read(name_a).float()
            b = self._adapter.read(name_b).float()
            return weight + (a if rows is None else a[:, rows]).T @ b.T * change.scale
        a = self._adapter.read(name_a).float()  # (r, in)
        b = self._adapter.read(name_b, rows).float()  # (out, r)
        weight = weight + b @ a * change.scale
        if change.magnitude:
            length = self._adapter.read(change.magnitude, rows).float()
            weight = (length / torch.linalg.norm(weight, dim=1))[:, None] * weight
        return weight

    def _expert_delta(self, change: Change, shape: torch.Size, rows: slice | None) -> torch.Tensor:
        """Return B A of one expert's matrix, or of the experts `rows` of a parameter that holds
        them all (peft's `ParamWrapper.get_delta_weight`).
        """
        import torch

        assert change.lora is not None
        assert change.experts is not None
        experts, (name_a, name_b) = change.experts, change.lora
        chosen = rows or slice(None)
        if experts.only is not None:
            chosen = slice(experts.only, experts.only + 1)
        first, last, _ = chosen.indices(experts.number)
        rank = self._adapter.shape(name_a)[0] // experts.number
        a = self._adapter.read(name_a, slice(first * rank, last * rank)).float()
        a = a.reshape(last - first, rank, -1)  # (experts, r, inputs)
        b = self._all_experts(name_b, experts.number)[:, :, first:last]  # (outputs, r, experts)
        delta = torch.einsum("ore,eri->eoi", b, a)
        if experts.only is None:
            return delta if delta.shape[1:] == shape[1:] else delta.transpose(1, 2)
        matrix = single(delta, experts.part, experts.layout)[0]
        return matrix if rows is None else matrix[rows]

    def _all_experts(self, name: str, experts: int) -> torch.Tensor:
        """Return a B of all experts, (outputs, r, experts); the last one is kept, since each
        expert's matrix needs its own columns of it.
        """
        with self._lock:
            if self._last_b is None or self._last_b[0] != name:
                whole = self._adapter.read(name).float()
                self._last_b = (name, whole.reshape(len(whole), -1, experts))
            return self._last_b[1]

    def _replace_rows(
        self, weight: torch.Tensor, change: Change, rows: slice | None
    ) -> torch.Tensor:
        assert change.row_values is not None
        values = self._adapter.read(change.row_values).float()
        first = rows.start or 0 if rows else 0
        for index, value in zip(change.row_indices, values, strict=True):
            if first <= index < first + len(weight):
                weight[index - first] = value
        return weight

    def _dequantize(self, name: str) -> torch.Tensor:
        """Return one bitsandbytes 4-bit weight in the config's dtype; the last one is kept for its
        next rows.
        """
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        with self._lock:
            if self._dequantized is None or self._dequantized[0] != name:
                parts = {
                    n: self._checkpoint.read(n)
                    for n in self._checkpoint.names
                    if n.startswith(name + ".")
                }
                if not parts:
                    raise FastFTError(
                        f"{self.base}: {name} is 8-bit; only 4-bit bitsandbytes weights are "
                        "dequantised."
                    )
                state = QuantState.from_dict(parts, device=torch.device("cpu"))
                self._dequantized = (name, dequantize_4bit(self._checkpoint.read(name), state))
            return self._dequantized[1]

    def _embedding_name(self) -> str:
        return next(
            n for n in self._checkpoint.names if n.endswith(EMBEDDING) and "per_layer" not in n
        )

    def _is_tied(self) -> bool:
        said = self.config.get(
            "tie_word_embeddings", self.config.get("text_config", {}).get("tie_word_embeddings")
        )
        has_head = any(n.endswith(HEAD) for n in self._checkpoint.names)
        return not has_head if said is None else bool(said)

    def _settle_stored_head(self) -> None:
        """Drop the head that some tied checkpoints also store, where it is the embedding's copy.

        Where the two differ (a trained head, merged and saved), transformers keeps them apart
        whatever the config says (`PreTrainedModel.tie_weights`), and so do we.
        """
        head = next((n for n in self._names if n.endswith(HEAD)), None)
        if (
            head is None
            or not self._is_tied()
            or not any(n.endswith(EMBEDDING) for n in self._names)
        ):
            return
        if self._equal(head, self._embedding_name()):
            self._names.remove(head)
            return
        for holder in (self.config, self.config.get("text_config", {})):
            if "tie_word_embeddings" in holder or holder is self.config:
                holder["tie_word_embeddings"] = False

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors of the base are the same, read some rows at a time."""
        import torch

        shape = self._checkpoint.shape(one)
        if shape != self._checkpoint.shape(other):
            return False
        parts = (slice(first, first + ROWS) for first in range(0, shape[0], ROWS))
        read = self._checkpoint.read
        return all(torch.equal(read(one, part), read(other, part)) for part in parts)

    def _read_changes(self) -> dict[str, Change]:
        """Sort the adapter's tensors by the base tensor that they change; every problem is
        reported at once.
        """
        changes: dict[str, Change] = {}
        problems: list[str] = []
        for key in self._adapter.names:
            if ".original_module." in key:
                continue  # what modules_to_save had before; peft saves it where it was resized
            module, kind = _split_key(key)
            if _is_of_experts(module) and kind in {"lora_A.weight", "lora_B.weight"}:
                if kind == "lora_A.weight":
                    self._read_experts(key, module, changes, problems)
                continue
            target = self._locate(
                module + (".bias" if kind in {"bias", "lora_B.bias"} else ".weight")
            )
            if target is None:
                problems.append(f"{key} changes {module}, which {self.base} does not have")
                continue
            change = changes.setdefault(target, Change())
            if kind in {"weight", "bias"}:
                change.replace = key
            elif kind in {"lora_A.weight", "lora_embedding_A"}:
                partner = key.replace("_A", "_B")
                if partner not in self._adapter:
                    problems.append(f"{key} has no lora_B")
                    continue
                change.lora, change.embedding = (key, partner), kind == "lora_embedding_A"
                change.scale = self._scale(module, self._adapter.shape(key)[0], problems)
            elif kind == "lora_magnitude_vector":
                change.magnitude = key
            elif kind == "trainable_tokens_delta":
                change.row_values, change.row_indices = key, self._trained_rows(module)
            elif kind == "lora_B.bias":
                rank = self._adapter.shape(key.replace("lora_B.bias", "lora_A.weight"))[0]
                change.add, change.scale = key, self._scale(module, rank, problems)
            elif kind not in {"lora_B.weight", "lora_embedding_B"}:
                problems.append(f"{key}: no merge is known for it")
        for target, change in changes.items():
            if change.magnitude and (change.embedding or not change.lora):
                problems.append(
                    f"{target}: DoRA on an embedding is not merged here; merge it with peft"
                )
        if problems:
            raise _all_problems(f"the adapter {self.adapter} does not fit", problems)
        return changes

    def _read_experts(
        self, key: str, module: str, changes: dict[str, Change], problems: list[str]
    ) -> None:
        """Sort a LoRA on an expert parameter. Its key names the module alone, since peft wraps one
        parameter around the other: which one it is, its shape tells.
        """
        home = module.replace(".base_layer", "")
        pair = (key, key.replace("lora_A", "lora_B"))
        config = self.config.get("text_config") or self.config
        layout = family_of(str(config.get("model_type"))).experts
        number = config.get("num_local_experts") or config.get("num_experts") or 0
        if pair[1] not in self._adapter or layout == "none" or not number:
            problems.append(f"{key}: the experts of {config.get('model_type')} are not known")
            return
        (rows, inputs), outputs = self._adapter.shape(key), self._adapter.shape(pair[1])[0]
        for parameter in dict.fromkeys(PARTS.values()):
            targets = self._expert_targets(home, parameter, number, layout)
            whole = self._parameter_shape(targets)
            if sorted((inputs, outputs)) == sorted(whole):
                name = f"{home}.{parameter}"
                scale = self._scale(name, rows // number, problems)
                changes |= {
                    target: Change(lora=pair, scale=scale, experts=experts)
                    for target, experts in targets.items()
                }
                return
        problems.append(f"{key} fits no expert parameter of {home} in {self.base}")

    def _expert_targets(
        self, home: str, parameter: str, number: int, layout: str
    ) -> dict[str, Experts]:
        """Return the base's tensors that hold an expert parameter: one for all, or one for each
        matrix of each expert; nothing where some are missing.
        """
        fused = self._locate(f"{home}.{parameter}")
        if fused:
            return {fused: Experts(number, layout)}
        found = {
            self._locate(f"{home}.{i}.{part}.weight"): Experts(number, layout, i, part)
            for part, held in PARTS.items()
            if held == parameter
            for i in range(number)
        }
        return {} if None in found else {str(name): experts for name, experts in found.items()}

    def _parameter_shape(self, targets: dict[str, Experts]) -> tuple[int, ...]:
        """Return the two inner dimensions of the parameter that `targets` are, or ()."""
        for name, experts in targets.items():
            shape = self._checkpoint.shape(name)
            if experts.only is None:
                return shape[1:]
            return shape if experts.part == "down_proj" else (2 * shape[0], shape[1])
        return ()

    def _locate(self, name: str) -> str | None:
        """Return the base tensor behind the module parameter `name`; a tied head counts as a
        tensor of its own.
        """
        candidates = [name] + [
            new + name[len(old) :] for old, new in RENAMES if name.startswith(old)
        ]
        for candidate in candidates:
            if candidate in self._checkpoint or candidate in self._names:
                return candidate
        return name if name.endswith(HEAD) and self._is_tied() else None

    def _scale(self, module: str, rank: int, problems: list[str]) -> float:
        if rank < 1:
            problems.append(f"{module} has a lora_A without rows")
            return 0.0
        config = self.adapter_config
        expected = _by_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        if expected != rank:
            problems.append(f"{module}: rank {rank} in the file, {expected} in adapter_config.json")
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    def _trained_rows(self, module: str) -> tuple[int, ...]:
        indices = self.adapter_config.get("trainable_token_indices")
        if isinstance(indices, dict):
            match = [
                value
                for key, value in indices.items()
                if module == key or module.endswith("." + key)
            ]
            if not match and self._is_tied():  # the head follows the embedding it is tied to
                match = list(indices.values())
            indices = match[0] if match else []
        return tuple(indices or ())

    def _settle_tying(self) -> None:
        """Decide whether tied embeddings are still one tensor after training, as peft's forward
        pass has it.
        """
        if not self._is_tied() or not any(n.endswith(EMBEDDING) for n in self._names):
            return
        embedding = self._embedding_name()
        inside = self.changed.get(embedding)
        head = next((n for n in self.changed if n.endswith(HEAD)), None)
        outside = self.changed.get(head) if head else None
        if inside is None and outside is None:
            return
        follows = outside is None and (
            self.adapter_config.get("ensure_weight_tying") or bool(inside.row_values)  # type: ignore[union-attr]
        )
        if follows or (inside and outside and self._same(inside, outside)):
            self.changed.pop(head or "", None)
            return
        name = head or HEAD
        if inside and inside.replace and not (outside and outside.replace):
            outside = outside or Change()
            if self._adapter.shape(inside.replace) != self._checkpoint.shape(embedding):
                outside.replace = inside.replace  # resized while tied: the new rows belong to both
        self.changed[name] = outside or Change()
        self._names.append(name)
        self.config["tie_word_embeddings"] = False

    def _same(self, one: Change, other: Change) -> bool:
        """Whether both changes give the same tensor (peft saves a tied pair twice)."""
        import torch

        plain = not (one.lora or other.lora or one.row_values or other.row_values)
        if plain and one.replace and other.replace:
            return torch.equal(self._adapter.read(one.replace), self._adapter.read(other.replace))
        return False

    def _check_shapes(self) -> None:
        problems = []
        for name, change in self.changed.items():
            shape = self.shape(name)
            if change.lora and not change.experts:
                a, b = (self._adapter.shape(part) for part in change.lora)
                made = (a[-1], b[0]) if change.embedding else (b[0], a[-1])
                if len(a) != 2 or len(shape) != 2 or made != shape:
                    problems.append(
                        f"{name}: the adapter's update is {list(made)}, the base's tensor "
                        f"{list(shape)}"
                    )
            elif (
                change.replace
                and name in self._checkpoint
                and shape[1:] != self._checkpoint.shape(name)[1:]
            ):
                problems.append(
                    f"{name}: {list(shape)} trained, {list(self._checkpoint.shape(name))} in "
                    "the base"
                )
        if problems:
            raise _all_problems(
                f"the adapter {self.adapter} was trained on another base than {self.base}", problems
            )

    def _settle_vocabulary(self) -> None:
        for name, change in self.changed.items():
            if change.replace and name.endswith(EMBEDDING):
                holder = (
                    self.config
                    if "vocab_size" in self.config
                    else self.config.get("text_config", {})
                )
                holder["vocab_size"] = self.shape(name)[0]


def resolve_base(
    adapter: Path, base: str | Path | None = None, *, local_only: bool = False
) -> Path:
    """Return the folder of the 16-bit base model that `adapter` was trained on.

    `base` overrides what adapter_config.json says. A Hub id is downloaded (safetensors and
    tokenizer only). For a base that was loaded from a pre-quantised repository (`...-bnb-4bit`),
    the 16-bit repository of the same name is meant.
    """
    named = str(
        base or read_json(Path(adapter), "adapter_config.json").get("base_model_name_or_path") or ""
    )
    if not named:
        raise FastFTError(
            f"{adapter} does not say which base it was trained on. Name it with --base PATH."
        )
    folder = Path(named).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or named.startswith(".") or named.count("/") != 1:
        raise FastFTError(f"the base {named} of {adapter} is not there. Name it with --base PATH.")
    return _download_base(re.sub(r"(-unsloth)?-bnb-4bit$", "", named), local_only)


def _download_base(repo: str, local_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [
        "*.safetensors",
        "*.safetensors.index.json",
        "*.json",
        "tokenizer*",
        "*.model",
        "*.jinja",
        "*.txt",
    ]
    try:
        with hub.bounded_waits():
            return Path(
                snapshot_download(repo, allow_patterns=patterns, local_files_only=local_only)
            )
    except (hub.http().HTTPError, OSError) as error:
        explained = hub.explain(error, f"base model {repo!r}")
        raise type(explained)(f"{explained} Or give a local folder with --base PATH.") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in `folder`/`name`; FastFTError says what kind of folder was
    expected.
    """
    path = folder / name
    if not path.is_file():
        what = "an adapter" if name.startswith("adapter") else "a model"
        raise FastFTError(f"{folder} has no {name}: it is not {what} folder.")
    return files.read_json(path)


def _check_quantization(base: Path, config: dict[str, Any], dequantize: bool) -> bool:
    """Return whether the base is 4-bit bitsandbytes and shall be dequantised; refuse every other
    quantised base.
    """
    found = config.get("quantization_config") or config.get("text_config", {}).get(
        "quantization_config"
    )
    if not found:
        return False
    method = str(
        found.get("quant_method", "bitsandbytes" if found.get("load_in_4bit") else "unknown")
    )
    if method == "bitsandbytes" and dequantize:
        return True
    more = (
        ", or merge onto its dequantised weights with dequantize=True"
        if method == "bitsandbytes"
        else ""
    )
    raise FastFTError(
        f"the base {base} is quantised ({method}): a merge onto it would keep its rounding "
        "errors. Give the 16-bit "
        f"model it was made from with --base PATH{more}."
    )


def _is_quantization_state(name: str) -> bool:
    return bool(
        re.search(
            r"\.weight\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*)$", name
        )
    )


def _check_adapter_kind(adapter: Path, config: dict[str, Any]) -> None:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')}; LORA is merged here")
    if config.get("fan_in_fan_out"):
        problems.append("fan_in_fan_out is set (weights stored transposed, as in GPT-2)")
    for key in (
        "use_qalora",
        "use_bdlora",
        "alora_invocation_tokens",
        "arrow_config",
        "layer_replication",
    ):
        if config.get(key):
            problems.append(f"{key} is set")
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(MOVING_INITS):
        problems.append(
            f"init_lora_weights {init} moved weights out of the base; save it as a plain LoRA with "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    problems += _nonsense(config)
    if problems:
        raise _all_problems(
            f"the adapter {adapter} cannot be merged tensor by tensor",
            problems,
            "merge_and_unload()",
        )


def _nonsense(config: dict[str, Any]) -> list[str]:
    """Return what is no number or no pattern among the settings that a merge computes with."""
    problems = []
    for key, least in (("r", 1), ("lora_alpha", 0)):
        value: Any = config.get(key)
        if not _is_number(value) or value < least:
            problems.append(f"{key} is {value!r}, not a number of at least {least}")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            problems.append(f"{key} is no mapping from names to numbers")
            continue
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{key} holds {pattern!r}: {error}")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all_problems(head: str, problems: list[str], way_out: str = "") -> FastFTError:
    shown = "".join(f"\n  - {p}" for p in problems[:12])
    more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
    fix = (
        f"\nLoad it with peft and merge it there with {way_out}."
        if way_out
        else "\nName its own base with --base."
    )
    return FastFTError(
        f"{head}: {len(problems)} problem{'s' if len(problems) > 1 else ''}{shown}{more}{fix}"
    )


def _split_key(key: str) -> tuple[str, str]:
    """Split an adapter key into the module's path and what the tensor is to it."""
    name = key.removeprefix(PREFIX)
    for kind in (
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
    ):
        if name.endswith("." + kind):
            return name[: -len(kind) - 1], kind
    if match := re.fullmatch(r"(.*)\.lora_magnitude_vector(?:\.weight)?", name):
        return match[1], "lora_magnitude_vector"
    if name.endswith(".token_adapter.trainable_tokens_delta"):
        return name.removesuffix(".token_adapter.trainable_tokens_delta"), "trainable_tokens_delta"
    name = (
        name.replace(".base_layer.", ".")
        .replace(".modules_to_save.", ".")
        .replace(".token_adapter.", ".")
    )
    module, _, kind = name.rpartition(".")
    return module, kind


def _is_of_experts(module: str) -> bool:
    """Whether `module` is that of a mixture's expert parameters, and no layer inside of it."""
    return module.replace(".base_layer", "").endswith(".experts")


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of `module`, as peft's
    get_pattern_key does.
    """
    for pattern, value in (patterns or {}).items():
        if matches(rf"(.*\.)?({pattern})", module, whole=True):
            return value
    return default
