"""The model that a name stands for, a folder or a Hub id: is it there, is it whole, its
tokenizer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastft import hub
from fastft.config import ModelConfig
from fastft.errors import FastFTError, is_out_of_memory
from fastft.files import read_json

LONGEST_HEADER = 100_000_000
"""Bytes; the format allows no more."""
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""A safetensors file's names of floating types, in torch's words; those of 8 bits apart."""
FLOATS_OF_8_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
PIECE = 4 * 2**20
"""Bytes of a tensor that are looked at together: an adapter may hold a whole head."""


def location(name: str) -> str:
    """Return a local folder as an absolute path, so that the adapter finds its base from anywhere;
    a Hub id as it is.
    """
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def load_tokenizer(config: ModelConfig) -> Any:
    """Return the base model's tokenizer with a padding token; raises FastFTError where there is
    none.
    """
    check_checkpoint(config.name, revision=config.revision)
    with explained(config.name):
        tokenizer = tokenizer_of(
            config.name,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            padding_side="right",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(name: str | Path, **keywords: Any) -> Any:
    """Return AutoTokenizer's tokenizer of `name`, or where that is of another kind than the
    tokenizer.json says, the one of tokenizer.json.

    transformers 5 rebuilds a tokenizer by the class that its config names. Published models name
    LlamaTokenizer for a Unigram (Japanese bases) or a byte-level BPE (DeepSeek's distillates), and
    get a SentencePiece BPE with the same tokens: other ids than the model was trained with, without
    a word. Raises FastFTError where only a tokenizer.model could say what is right.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(name, **keywords)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    files = _tokenizer_files(str(name), keywords.get("revision"))
    if "tokenizer.json" in files:
        said = _kind(files["tokenizer.json"].read_text(encoding="utf-8"))
        if said and said != _kind(_steps(backend)):
            return PreTrainedTokenizerFast.from_pretrained(name, **keywords)
    elif "tokenizer.model" in files and type(backend.model).__name__ == "BPE":
        _refuse_unigram(str(name), files["tokenizer.model"])
    return tokenizer


_KIND = re.compile(r'"type"\s*:\s*"(Unigram|ByteLevel)"')  # inside a token the quotes are escaped


def _kind(steps: str) -> str:
    """Return Unigram, ByteLevel or nothing: the kind of tokenizer that a JSON describes."""
    found = set(_KIND.findall(steps))
    return "Unigram" if "Unigram" in found else "".join(found)


def _steps(backend: Any) -> str:
    """Return the JSON of a tokenizer's steps and the kind of its model, without its vocabulary."""
    parts = [part for part in (backend.pre_tokenizer, backend.decoder) if part is not None]
    texts = [bytes(part.__getstate__()).decode("utf-8") for part in parts]
    return "".join([*texts, f'{{"type": "{type(backend.model).__name__}"}}'])


UNIGRAM = 1  # sentencepiece's TrainerSpec.ModelType


def _refuse_unigram(name: str, path: Path) -> None:
    """Raise FastFTError where tokenizer.model is a Unigram that was read as a BPE."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # made when it is imported; no types are known
    try:
        spec = messages.ModelProto.FromString(path.read_bytes()).trainer_spec
    except DecodeError:  # another format under that name
        return
    if spec.model_type == UNIGRAM:
        raise FastFTError(
            f"transformers reads the tokenizer.model of {name} as a BPE, but it is a Unigram: it "
            "would cut texts into other tokens than the model was trained with. Give it a "
            "tokenizer.json: in an environment with 'transformers<5', "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )


def _tokenizer_files(name: str, revision: str | None) -> dict[str, Path]:
    """Return the files that say what a model's tokenizer is, in its folder or the Hub's cache."""
    names, folder = ("tokenizer.json", "tokenizer.model"), Path(name).expanduser()
    if folder.is_dir():
        return {file: folder / file for file in names if (folder / file).is_file()}
    from huggingface_hub import try_to_load_from_cache

    cached = {file: try_to_load_from_cache(name, file, revision=revision) for file in names}
    return {file: Path(path) for file, path in cached.items() if isinstance(path, str)}


def bitsandbytes_config(quantization: str, dtype: Any) -> Any:
    """Return transformers' config for weights held in "nf4" or "int8", computed in `dtype`; None
    for "none".
    """
    if quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def tokens_without_row(tokenizer: Any, rows: int) -> dict[str, int]:
    """Return {token: id} of the tokens above the last of `rows` embedding rows, where the model can
    do without them.

    Published Gemma 3 1B and 270M have such a token for images. Raises FastFTError where the
    vocabulary itself, the end of a text or the chat template needs one: then it is another model's
    tokenizer.
    """
    beyond = {text: index for text, index in tokenizer.get_vocab().items() if index >= rows}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    named = {getattr(tokenizer, f"{kind}_token", None) for kind in ("bos", "eos", "pad", "unk")}
    template = str(tokenizer.chat_template or "")
    needed = [t for t in beyond if t not in added or t in named or t in template]
    if needed:
        raise FastFTError(
            f"the tokenizer of {tokenizer.name_or_path} has token ids up to "
            f"{max(beyond.values())}, the model {rows} embedding rows, and "
            f"{needed[0]!r} is needed. Give the tokenizer that the model was trained with, or "
            "resize the embeddings before training."
        )
    return beyond


def check_checkpoint(name: str, *, revision: str | None = None, token: str | None = None) -> None:
    """Raise FastFTError unless `name` is a model with safetensors weights: a folder, or a Hub id
    that can be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise FastFTError(
            f"model {name} is a file. Give the folder that holds config.json, or a Hub id."
        )
    if folder.is_dir():
        return _check_folder(folder)
    looks_local = name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or ":" in name
    if looks_local or not name.strip():
        raise FastFTError(
            f"model folder {name!r} does not exist. Give a folder that holds config.json, or "
            "a Hub id."
        )
    _check_hub(name, revision, token)


READ_BY_LIBRARIES = (".json", ".jinja", ".model", ".safetensors", ".txt")


def check_files(folder: Path) -> None:
    """Raise FastFTError for a link to nothing, a pipe or a folder under the name of a file that
    the libraries would open; they would wait for a pipe for ever.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in READ_BY_LIBRARIES and not path.is_file():
            what = "a link to nothing" if path.is_symlink() else "no plain file"
            raise FastFTError(f"{path} is {what}. Download or copy the model again.")


def _check_folder(folder: Path) -> None:
    files = sorted(p.name for p in folder.iterdir())
    if "config.json" not in files and "adapter_config.json" not in files:
        found = ", ".join(files[:5]) or "nothing"
        raise FastFTError(f"{folder} is not a model: it has no config.json (found: {found}).")
    check_files(folder)
    again = "Download the model again."
    config = read_json(folder / "config.json", again) if "config.json" in files else {}
    if "config.json" in files and not (
        isinstance(config.get("model_type"), str) and config["model_type"]
    ):
        raise FastFTError(
            f"{folder / 'config.json'} has no model_type: it is not a transformers model."
        )
    weights = [folder / name for name in files if name.endswith(".safetensors")]
    for path in weights:
        read_header(path)
    if weights:
        return
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise FastFTError(
            f"{folder} has only pickle weights ({pickles[0]}), which can run code when "
            "loaded. Convert them to "
            "safetensors on a machine you can spare, or use a checkpoint that has them."
        )
    raise FastFTError(
        f"{folder} has a config.json but no *.safetensors weights. Download the model again."
    )


def read_header(path: Path, *, whole: bool = True) -> tuple[dict[str, dict[str, Any]], int]:
    """Return ({tensor: {"dtype", "shape", "data_offsets"}} in the file's order, where its data
    begins) of a .safetensors file (github.com/huggingface/safetensors, "Format").

    Raises FastFTError where it is none or, with `whole`, where the file is shorter than its header
    says: a download or copy that was cut off.
    """
    if not path.is_file():  # a pipe would be waited for, a link may lead nowhere
        what = "a link to nothing" if path.is_symlink() else "no plain file"
        raise FastFTError(f"{path} is {what}. Download or copy it again.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= min(LONGEST_HEADER, size):
            raise FastFTError(
                f"{path} is not a safetensors file, or is cut off. Download or copy it again."
            )
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            for entry in entries.values():
                entry["dtype"], list(map(int, entry["shape"])), int(entry["data_offsets"][1])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FastFTError(
                f"{path} has a damaged header: {error}. Download or copy it again."
            ) from error
    needed = 8 + length + max((e["data_offsets"][1] for e in entries.values()), default=0)
    if whole and size < needed:
        raise FastFTError(
            f"{path} is cut off: {size:,} of {needed:,} bytes are there. Download or copy it again."
        )
    in_order = sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
    return dict(in_order), 8 + length


def check_finite(path: Path) -> None:
    """Raise FastFTError naming the first tensor of a safetensors file that holds a NaN or an
    infinity: whoever answers with such an adapter answers nonsense.
    """
    import torch
    from safetensors import safe_open

    kinds = FLOATS | FLOATS_OF_8_BITS
    entries, data = read_header(path)
    with explained(str(path)), safe_open(path, "pt"), path.open("rb") as file:
        for name, entry in entries.items():
            begin, end = entry["data_offsets"] if entry["dtype"] in kinds else (0, 0)
            file.seek(data + begin)
            for left in range(end - begin, 0, -PIECE):
                kind = getattr(torch, kinds[entry["dtype"]])
                values = torch.frombuffer(bytearray(file.read(min(PIECE, left))), dtype=kind)
                if values.itemsize == 1:  # torch has no isfinite for all of these
                    values = values.float()
                if not values.isfinite().all():
                    raise FastFTError(
                        f"{path} is not usable: {name} holds numbers that are not finite (NaN or "
                        "infinity). The training diverged; take an earlier checkpoint."
                    )


def _check_hub(name: str, revision: str | None, token: str | None) -> None:
    """Ask the Hub (or its cache, when offline) whether `name` exists and has safetensors."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        if hub.is_offline():
            raise FastFTError(
                f"model {name!r} is not in the local cache, and HF_HUB_OFFLINE is set. Unset "
                "it, or give a folder."
            )
        with hub.bounded_waits():
            files = HfApi().list_repo_files(name, revision=revision, token=token)
    except (HfHubHTTPError, HFValidationError) as error:
        raise hub.explain(error, f"model {name!r}") from error
    except (hub.http().HTTPError, OSError) as error:
        raise FastFTError(
            f"model {name!r}: no such folder, and the Hub cannot be reached "
            f"({type(error).__name__}). Check the spelling, "
            "or the network, or give a local folder."
        ) from error
    if "config.json" in files and not any(f.endswith(".safetensors") for f in files):
        raise FastFTError(
            f"model {name!r} has no safetensors weights, only pickles; fastft does not load those."
        )


class explained:
    """Turn what a library raises for a checkpoint that it cannot use into one clear message.

    The libraries raise whatever their code meets first (KeyError, TypeError, tokenizers even a bare
    Exception): each is an answer about the files, unless memory ran out. --debug shows it whole.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, FastFTError) or not isinstance(error, Exception):
            return
        if is_out_of_memory(error):
            return
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = first if isinstance(error, OSError | ValueError) and first else ""
        what = what or f"{type(error).__name__}{f': {first}' if first else ''}"
        hint = " Try model.engine: stock." if isinstance(error, NotImplementedError) else ""
        raise FastFTError(f"model {self.name} could not be loaded: {what[:500]}{hint}") from error
