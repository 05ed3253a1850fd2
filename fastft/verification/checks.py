"""The checks of one exported file against the reference of the trained model.

Runs as a process of its own (``python -m fastft.verification.checks JOB.json``): llama.cpp may end
the process on a bad file. Each check is announced before it begins, so that the caller can name
the one that killed it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastft.errors import FastFTError
from fastft.exporting.certificate import Check, judge_distance, weight_limit
from fastft.families import FAMILIES, family_of
from fastft.files import read_json
from fastft.verification.reference import head_count, rotary_rows, sampled_rows

if TYPE_CHECKING:
    from fastft.inference.llamacpp import GgufModel

LogitsOf = Callable[[list[int]], "Iterator[np.ndarray]"]

ARCHITECTURES = {name: row.gguf.arch for name, row in FAMILIES.items() if row.gguf}
"""transformers' model_type -> llama.cpp's general.architecture, for the families whose weights are
compared.
"""


ROPE_TABLES = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
"""What llama.cpp keeps as tensors and transformers computes from the config."""


class Report:
    """Writes each check's begin and outcome to a file as it happens, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, name: str, check: Callable[[], Check]) -> Check:
        """Run one check; a FastFTError in it is a failed check."""
        self.write({"begin": name})
        try:
            outcome = check()
        except FastFTError as error:
            outcome = Check(name, "fail", str(error))
        self.write({"name": outcome.name, "verdict": outcome.verdict, "detail": outcome.detail})
        return outcome

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def main() -> None:
    """Read the job file named on the command line and check its file."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    reference = json.loads((Path(job["reference"]) / "reference.json").read_text(encoding="utf-8"))
    reference["folder"] = job["reference"]
    report = Report(Path(job["report"]))
    check = {
        "gguf": check_gguf,
        "gguf-lora": check_gguf_lora,
        "adapter": check_folder,
        "merged": check_folder,
    }
    check[job["kind"]](job, reference, report)


def check_gguf(job: dict[str, Any], reference: dict[str, Any], report: Report) -> None:
    """All checks of a whole model in GGUF form."""
    from fastft.inference.llamacpp import open_gguf

    path = Path(job["path"])
    opened: list[GgufModel] = []

    def load() -> Check:
        opened.append(open_gguf(path, n_ctx=context_needed(reference), exact=True))
        return Check("load", "pass", f"llama.cpp loads it; {opened[0].n_vocab} tokens")

    if report.run("load", load).verdict == "fail":
        return
    model = opened[0]
    reader = gguf_reader(path)
    report.run("tensors", lambda: check_tensors(path, reader, reference))
    report.run("weights", lambda: check_weights(reader, reference))
    check_behaviour(model, weight_type(reader), reference, report)


def check_gguf_lora(job: dict[str, Any], reference: dict[str, Any], report: Report) -> None:
    """All checks of an adapter in GGUF form, on a GGUF of its base."""
    from fastft.inference.llamacpp import open_gguf

    path, base = Path(job["path"]), Path(job["base_gguf"])
    opened: list[GgufModel] = []

    def load() -> Check:
        opened.append(open_gguf(base, n_ctx=context_needed(reference), exact=True, loras=[path]))
        opened[0].use_lora(path.stem)
        return Check("load", "pass", f"llama.cpp applies it to {base.name}")

    report.run("tensors", lambda: check_lora_tensors(path, job["adapter"]))
    if report.run("load", load).verdict != "fail":
        kind = weight_type(gguf_reader(base))
        report.run("distance", lambda: check_distance(opened[0].logits, kind, reference, report))
        report.run("generation", lambda: check_generation(opened[0], reference))


def check_behaviour(model: GgufModel, kind: str, reference: dict[str, Any], report: Report) -> None:
    """What the file does with text: ids, BOS, template, control tokens that a user writes, end
    tokens, logits, greedy answers.
    """
    report.run("tokens", lambda: check_tokens(model, reference))
    report.run("bos", lambda: check_bos(model, reference))
    report.run("template", lambda: check_template(model, reference))
    report.run("user text", lambda: check_user_text(model, reference))
    report.run("end", lambda: check_end(model, reference))
    report.run("distance", lambda: check_distance(model.logits, kind, reference, report))
    report.run("generation", lambda: check_generation(model, reference))


def context_needed(reference: dict[str, Any]) -> int:
    """Return the context length that the reference's sequences and answers need."""
    lengths = [len(s["ids"]) for s in reference["sequences"]]
    lengths += [2 * len(g["ids"]) + len(g["prompt"]) + 64 for g in reference["greedy"]]
    return max(256, *lengths) + 1


def gguf_reader(path: Path) -> Any:
    """Return the PyPI gguf package's reader of the file."""
    try:
        import gguf
    except ImportError as error:
        raise FastFTError(
            "checking GGUF files needs the package gguf; install it with: pip install gguf"
        ) from error
    return gguf.GGUFReader(path)


def weight_type(reader: Any) -> str:
    """Return the file's weight type as users write it: "q4_k_m", "f16" (from general.file_type)."""
    import gguf

    field = reader.get_field("general.file_type")
    if field is None:
        return "f32"
    name = gguf.LlamaFileType(field.contents()).name.lower()
    return name.removeprefix("mostly_").removeprefix("all_")


# Tensors


def check_tensors(path: Path, reader: Any, reference: dict[str, Any]) -> Check:
    """Every tensor of the trained model is there, with its shape, and in the type llama.cpp itself
    would choose.
    """
    expected, unknown = expected_names(reader, reference)
    present = {tensor.name: tensor for tensor in reader.tensors}
    problems = [f"{gguf_name} is missing" for gguf_name in expected if gguf_name not in present]
    for gguf_name, hf_name in expected.items():
        shape = reference["tensors"][hf_name]
        found = present[gguf_name].shape.tolist() if gguf_name in present else shape[::-1]
        # A convolution has a dimension of 1 in transformers that GGUF leaves out.
        if [n for n in found if n != 1] != [n for n in shape[::-1] if n != 1]:
            problems.append(f"{gguf_name} has shape {found}, planned {shape[::-1]}")
    problems += unplanned_types(path, reader)
    extra = set(present) - set(expected) - ROPE_TABLES
    if extra and not unknown:
        problems.append(
            f"tensors that the trained model does not have: {', '.join(sorted(extra)[:5])}"
        )
    if problems:
        return Check("tensors", "fail", f"{len(problems)} wrong: " + "; ".join(problems[:5]))
    detail = f"{len(present)} tensors, shapes and types as planned"
    if unknown:
        detail += f"; {len(unknown)} have no known counterpart ({unknown[0]} ...)"
        return Check("tensors", "warn", detail)
    return Check("tensors", "pass", detail)


def expected_names(reader: Any, reference: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return {GGUF name: checkpoint name} of the trained model's tensors, and those without a
    known GGUF name.

    Raises FastFTError where the file says it is another architecture.
    """
    import gguf

    arch = reader.get_field("general.architecture").contents()
    model_type = reference["config"]["model_type"]
    if ARCHITECTURES.get(model_type, arch) != arch:
        raise FastFTError(f"the file's architecture is {arch}, the trained model is {model_type}")
    enum = {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(enum, reference["config"]["num_hidden_layers"])
    known, unknown, present = {}, [], {tensor.name for tensor in reader.tensors}
    for hf_name in reference["tensors"]:
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            unknown.append(hf_name)
        else:  # a parameter of its own, such as gpt_oss's sinks, has no suffix in transformers
            suffixed = gguf_name.endswith((".weight", ".bias")) or gguf_name in present
            known[gguf_name if suffixed else f"{gguf_name}.weight"] = hf_name
    return known, unknown


def planned_types(path: Path, reader: Any) -> list[dict[str, str]]:
    """Return llama.cpp's own plans {tensor: type} for a file of this type: without and with an
    importance matrix.

    Made by a dry run of its quantiser on the file itself; empty for 16 and 32 bit and where the
    dry run refuses.
    """
    import ctypes
    import re

    from fastft.inference import llamacpp

    if weight_type(reader) in {"f32", "f16", "bf16"}:
        return []
    api = llamacpp.bindings()
    entries = (api.llama_model_imatrix_data * 2)()  # ends with an empty one
    values = (ctypes.c_float * 1)(1.0)
    entries[0].name, entries[0].size = b"any", 1
    entries[0].data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
    line = re.compile(
        r"\]\s+(\S+)\s+-\s+\[[^\]]*\], type =\s*(\w+), size = [^\n]*?(?:\((\w+)\))?\n"
    )
    plans = []
    for imatrix in (None, entries):
        params = api.llama_model_quantize_default_params()
        params.ftype = reader.get_field("general.file_type").contents()
        params.dry_run = params.allow_requantize = True
        if imatrix is not None:
            params.imatrix = ctypes.cast(imatrix, type(params.imatrix))
        log: list[str] = []
        with llamacpp.everything_logged(log):
            code = api.llama_model_quantize(str(path).encode(), b"", ctypes.byref(params))
        if code == 0:
            plans.append(
                {name: (new or old).lower() for name, old, new in line.findall("".join(log))}
            )
    return plans


def unplanned_types(path: Path, reader: Any) -> list[str]:
    """Return what is stored in another type than llama.cpp would choose, by the plan that comes
    nearest.
    """
    found = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    differences = [
        [
            f"{name} is {kind}, llama.cpp's own plan is {plan[name]}"
            for name, kind in found.items()
            if plan[name] != kind
        ]
        for plan in planned_types(path, reader)
        if plan.keys() >= found.keys()
    ]
    return min(differences, key=len, default=[])


def check_weights(reader: Any, reference: dict[str, Any]) -> Check:
    """Every weight of the file, dequantised, is the trained one up to what its type can hold."""
    names, _ = expected_names(reader, reference)
    if reference["config"]["model_type"] not in ARCHITECTURES:
        return check_weights_in_any_form(reader, reference, names)
    trained = np.load(Path(reference["folder"]) / "weights.npz")
    present = {tensor.name: tensor for tensor in reader.tensors}
    problems, largest = [], (0.0, "none")
    for gguf_name, hf_name in names.items():
        if gguf_name not in present:
            continue
        rows = sampled_rows(reference["tensors"][hf_name])
        found = dequantised_rows(present[gguf_name], rows)
        expected = trained_rows(trained, hf_name, rows, reference)
        error = relative_error(found, expected)
        kind = present[gguf_name].tensor_type.name.lower()
        limit = weight_limit(kind)
        largest = max(
            largest, (error / limit, f"{gguf_name} ({kind}) {error:.2g}, limit {limit:g}")
        )
        if not error <= limit:
            why = explain(found, expected, plain_rows(trained, hf_name, rows, reference), limit)
            problems.append(f"{gguf_name} ({kind}) {why}; relative error {error:.2g}")
    if problems:
        detail = f"{len(problems)} of {len(names)} tensors differ: {'; '.join(problems[:4])}"
        return Check("weights", "fail", detail)
    return Check("weights", "pass", f"{len(names)} tensors; nearest to its limit: {largest[1]}")


def check_weights_in_any_form(
    reader: Any, reference: dict[str, Any], names: dict[str, str]
) -> Check:
    """The weights of a family that llama.cpp's own converter wrote: each is the trained one as it
    stands, in llama.cpp's order of rotary rows, or a norm plus one. What is in another form is
    named, and only the answers speak for it.
    """
    trained = np.load(Path(reference["folder"]) / "weights.npz")
    present = {tensor.name: tensor for tensor in reader.tensors}
    other, compared = [], {name: hf for name, hf in names.items() if name in present}
    for gguf_name, hf_name in compared.items():
        rows = sampled_rows(reference["tensors"][hf_name])
        found = dequantised_rows(present[gguf_name], rows)
        limit = weight_limit(present[gguf_name].tensor_type.name.lower())
        errors = [
            relative_error(found, expected)
            for expected in forms(trained, hf_name, rows, reference)
            if expected.size == found.size
        ]
        if not any(error <= limit for error in errors):
            other.append(gguf_name)
    if other:
        detail = f"{len(other)} of {len(compared)} tensors are in a form that is not known"
        return Check("weights", "warn", f"{detail}: {', '.join(other[:6])}")
    return Check("weights", "pass", f"{len(compared)} tensors, each in a known form")


def forms(
    trained: Any, hf_name: str, rows: np.ndarray, reference: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Yield the chosen rows of a trained weight in every form that a GGUF file may have them in."""
    kept, have = trained[hf_name], trained[f"{hf_name}#rows"]
    width = kept.shape[-1] if kept.ndim > 1 else 1
    plain = kept[np.searchsorted(have, rows)].reshape(len(rows), width)
    yield plain.reshape(-1) if kept.ndim == 1 else plain
    if hf_name.endswith("norm.weight"):
        yield kept[np.searchsorted(have, rows)] + np.float32(1)
    total, heads = reference["tensors"][hf_name][0], heads_of(hf_name, reference["config"])
    if heads and total % (2 * heads) == 0:
        yield kept[np.searchsorted(have, rotary_rows(total, heads)[rows])]


def dequantised_rows(tensor: Any, rows: np.ndarray) -> np.ndarray:
    """Return the chosen rows of a GGUF tensor as float32, (rows, width)."""
    import gguf

    data = tensor.data
    width = int(tensor.shape[0])
    if len(tensor.shape) == 1:
        return np.asarray(data, dtype=np.float32).reshape(-1)[rows]
    chosen = np.ascontiguousarray(data.reshape(-1, data.shape[-1])[rows])
    values = gguf.quants.dequantize(chosen, tensor.tensor_type)
    return values.reshape(len(rows), width).astype(np.float32)


def trained_rows(
    trained: Any, hf_name: str, rows: np.ndarray, reference: dict[str, Any]
) -> np.ndarray:
    """Return the rows of a trained weight in the order and form in which the GGUF file must hold
    them.
    """
    config = reference["config"]
    heads = heads_of(hf_name, config)
    family = family_of(config["model_type"])
    if heads and family.gguf and family.gguf.permuted:
        rows = rotary_rows(reference["tensors"][hf_name][0], heads)[rows]
    found = trained[hf_name][np.searchsorted(trained[f"{hf_name}#rows"], rows)]
    if family.norm_shift and hf_name.endswith("norm.weight"):
        return found + np.float32(family.norm_shift)  # llama.cpp multiplies by the weight itself
    return found


def heads_of(hf_name: str, config: dict[str, Any]) -> int:
    """Return the number of heads of a q or k projection, 0 for every other tensor."""
    return head_count(hf_name, config["num_attention_heads"], config["num_key_value_heads"])


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the root-mean-square difference over the root-mean-square of `expected`."""
    size = float(np.sqrt(np.square(expected, dtype=np.float64).mean()))
    difference = float(np.sqrt(np.square(found.astype(np.float64) - expected).mean()))
    return difference / size if size else difference


def plain_rows(
    trained: Any, hf_name: str, rows: np.ndarray, reference: dict[str, Any]
) -> np.ndarray | None:
    """Return the rows of a q or k projection in the checkpoint's order, None for every other
    tensor.
    """
    if not heads_of(hf_name, reference["config"]):
        return None
    return trained[hf_name][np.searchsorted(trained[f"{hf_name}#rows"], rows)]


def explain(found: np.ndarray, expected: np.ndarray, plain: np.ndarray | None, limit: float) -> str:
    """Return in words how a wrong weight differs from the trained one, as far as it can be told.

    `plain`: for q and k projections, the rows as the checkpoint orders them.
    """
    if not found.any():
        return "is all zeros"
    if not np.isfinite(found).all():
        return "has values that are not finite"
    zero_rows = int((found.reshape(len(found), -1) == 0).all(axis=1).sum())
    if zero_rows:
        return f"has {zero_rows} of {len(found)} compared rows that are all zeros"
    if plain is not None:
        same_rows = np.allclose(sorted_norms(found), sorted_norms(expected), rtol=limit)
        if same_rows or relative_error(found, plain) <= limit:
            return (
                "has the rows of its heads in the wrong order (the permutation of q and k is "
                "missing or wrong)"
            )
    return "is another weight than the trained one"


def sorted_norms(rows: np.ndarray) -> np.ndarray:
    """Return the Euclidean norms of the rows in ascending order: the same for rows in any order."""
    return np.sort(np.linalg.norm(rows.reshape(len(rows), -1).astype(np.float64), axis=1))


def check_lora_tensors(path: Path, adapter: str) -> Check:
    """Every LoRA matrix of the adapter folder has its pair in the GGUF file."""
    from safetensors import safe_open

    reader = gguf_reader(path)
    pairs = {t.name.rsplit(".lora_", 1)[0] for t in reader.tensors if ".lora_" in t.name}
    with safe_open(Path(adapter) / "adapter_model.safetensors", "np") as file:
        modules = {k.rsplit(".lora_", 1)[0] for k in file.keys() if ".lora_A" in k}  # noqa: SIM118
        others = [k for k in file.keys() if ".lora_A" not in k and ".lora_B" not in k]  # noqa: SIM118
    if others:
        detail = f"the adapter also trains {others[0]}, which a GGUF adapter cannot hold"
        return Check("tensors", "fail", detail)
    if len(pairs) != len(modules):
        detail = f"{len(pairs)} LoRA pairs in the file, {len(modules)} in the adapter"
        return Check("tensors", "fail", detail)
    return Check("tensors", "pass", f"{len(pairs)} LoRA pairs")


# Text


def check_tokens(model: GgufModel, reference: dict[str, Any]) -> Check:
    """The ids of the hard texts, the run's data and the conversations are the trained tokenizer's.

    Where only a known limit of llama.cpp shows (`known_limit`), a made-up text is noted and the
    run's own text warns.
    """
    cases = 0
    found: dict[str, list[str]] = {"pass": [], "warn": [], "fail": []}
    for origin, text, expected, add_special in token_cases(reference):
        cases += 1
        ids = model.tokens(text, add_special=add_special)
        if ids == expected:
            continue
        limit = known_limit(model, text, ids, expected, add_special)
        if limit:
            verdict = "warn" if origin in {"data", "chat"} else "pass"
        else:
            # nobody trains on special tokens in mid-text
            verdict = "warn" if origin == "special tokens" else "fail"
        found[verdict].append(f"{origin} text {text[:40]!r} ({limit or around(ids, expected)})")
    kind = (
        f"tokenizer {model.metadata('tokenizer.ggml.model')}, pre-tokenizer "
        f"{model.metadata('tokenizer.ggml.pre')}"
    )
    for verdict in ("fail", "warn", "pass"):
        if cases_here := found[verdict]:
            detail = (
                f"{len(cases_here)} of {cases} texts are split differently ({kind}): "
                f"{'; '.join(cases_here[:3])}"
            )
            return Check("tokens", verdict, detail)
    return Check("tokens", "pass", f"{cases} texts have the same ids ({kind})")


def known_limit(
    model: GgufModel, text: str, ids: list[int], expected: list[int], add_special: bool
) -> str | None:
    """Return which known limit of llama.cpp explains that `text` got `ids`, or None.

    It does not compose characters, as some tokenizers do (NFC); and its SentencePiece puts no
    space behind a special token where some published tokenizers do, so that the number of spaces
    there differs. Its Unigram has no byte fall-back.
    """
    import unicodedata

    composed = unicodedata.normalize("NFC", text)
    if composed != text and model.tokens(composed, add_special=add_special) == expected:
        return "llama.cpp does not compose characters; write the text in NFC"

    def words(tokens: list[int]) -> list[bytes]:
        return [piece for t in tokens if (piece := model.piece(t, special=True).strip())]

    kind = model.metadata("tokenizer.ggml.model")
    if kind in {"llama", "t5"} and words(ids) == words(expected):
        return "another number of spaces beside a special token"
    if kind == "t5" and known_pieces(model, ids) == known_pieces(model, expected):
        return (
            "llama.cpp's Unigram has no bytes for what no piece covers: it reads one unknown token"
        )
    return None


def known_pieces(model: GgufModel, ids: list[int]) -> list[bytes]:
    """Return the pieces of `ids`, with a gap in place of each run of bytes or unknown tokens."""
    found: list[bytes] = []
    for index in ids:
        piece = b"" if model.is_byte_or_unknown(index) else model.piece(index, special=True)
        if piece or not found or found[-1]:
            found.append(piece)
    return found


def token_cases(reference: dict[str, Any]) -> Iterator[tuple[str, str, list[int], bool]]:
    """Yield (origin, text, expected ids, whether special tokens are added) of everything that is
    compared.
    """
    for entry in reference["texts"]:
        if entry["origin"] != "data":  # a rendered conversation already holds its BOS
            yield entry["origin"], entry["text"], entry["with_special"], True
        yield entry["origin"], entry["text"], entry["without"], False
    for chat in reference["chats"]:
        if chat["text"] is not None:
            yield "chat", chat["text"], chat["ids"], False


def around(found: list[int], expected: list[int]) -> str:
    """Return the first place where two lists of ids part, with a few ids of each."""
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
        min(map(len, (found, expected))),
    )
    return f"at {at} ids {found[at : at + 4]} instead of {expected[at : at + 4]}"


def check_bos(model: GgufModel, reference: dict[str, Any]) -> Check:
    """A text and a conversation begin with as many BOS tokens as in training: one, or none for
    models without.
    """
    bos = reference["bos_id"]
    problems = []
    if bos is not None and model.bos != bos:
        problems.append(f"the file's BOS is token {model.bos}, the tokenizer's is {bos}")

    def leading(ids: list[int]) -> int:
        marks = {bos, model.bos}
        return next((i for i, token in enumerate(ids) if token not in marks), len(ids))

    raw = reference["texts"][0]
    counts = [("a plain text", leading(model.tokens(raw["text"])), leading(raw["with_special"]))]
    for chat in [c for c in reference["chats"] if c["text"] is not None][:1]:
        ids = model.chat_tokens(
            chat["messages"], add_generation_prompt=chat["add_generation_prompt"]
        )
        served, trained = server_tokens(model, chat), leading(chat["ids"])
        counts.append(("a conversation", leading(ids), trained))
        counts.append(("a conversation in llama-server", leading(served), trained))
    problems += [
        f"{what} begins with {n} BOS tokens instead of {m}" for what, n, m in counts if n != m
    ]
    if problems:
        return Check("bos", "fail", "; ".join(problems))
    detail = f"plain text {counts[0][1]}, conversation {counts[-1][1]}, as in training"
    return Check("bos", "pass", detail)


def server_tokens(model: GgufModel, chat: dict[str, Any]) -> list[int]:
    """Return the ids as llama.cpp's own programs make them: the template's BOS is cut, the
    tokenizer adds its own.
    """
    text = model.render(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
    bos = model.piece(model.bos, special=True).decode() if model.bos >= 0 else ""
    if bos and model.adds_bos:
        text = text.removeprefix(bos)
    return model.tokens(text, add_special=True)


def check_template(model: GgufModel, reference: dict[str, Any]) -> Check:
    """The file's chat template writes every conversation as the trained tokenizer's does."""
    chats = reference["chats"]
    if not chats:
        has = model.metadata("tokenizer.chat_template")
        also = ", the file has one" if has else ""
        detail = f"the trained tokenizer has no chat template{also}"
        return Check("template", "warn" if has else "pass", detail)
    for chat in chats:
        try:
            found = model.render(
                chat["messages"], add_generation_prompt=chat["add_generation_prompt"]
            )
        except FastFTError as error:
            if chat["text"] is None:
                continue
            return Check("template", "fail", str(error))
        if found != chat["text"]:
            detail = f"the file renders {found!r}, the trained tokenizer {chat['text']!r}"
            return Check("template", "fail", detail)
    return Check("template", "pass", f"{len(chats)} conversations render to the same text")


def check_user_text(model: GgufModel, reference: dict[str, Any]) -> Check:
    """A control token that a user writes is text, as in training: no message ends there."""
    differently = []
    for chat in reference["spelled"]:
        found, expected = model.chat_tokens(chat["messages"]), chat["ids"]
        if sum(map(model.is_control, found)) != sum(map(model.is_control, expected)):
            detail = (
                f"{chat['token']} in a message is read as that token: {around(found, expected)}"
            )
            return Check("user text", "fail", detail)
        if found != expected:
            differently.append(f"{chat['token']} ({around(found, expected)})")
    count = len(reference["spelled"])
    if differently:
        detail = f"{len(differently)} of {count} control tokens in a message are split differently"
        return Check("user text", "warn", f"{detail}: {'; '.join(differently[:3])}")
    detail = f"{count} control tokens written in a message are text in `fastft chat` and `serve`"
    return Check("user text", "pass", detail)


def check_end(model: GgufModel, reference: dict[str, Any]) -> Check:
    """Every token that ended an answer in training ends generation in llama.cpp."""
    names = dict(zip(reference["stop_ids"], reference["stop_names"], strict=True))
    missing = [f"{name} ({i})" for i, name in names.items() if not model.ends(i)]
    if missing:
        detail = (
            f"generation would not stop at {', '.join(missing)}; the file's EOS is token "
            f"{model.eos}"
        )
        return Check("end", "fail", detail)
    return Check("end", "pass", f"generation stops at {', '.join(names.values())}")


def check_generation(model: GgufModel, reference: dict[str, Any]) -> Check:
    """Where the trained model's greedy answer ends by itself, the file's does, given twice the
    room.
    """
    expected = [g for g in reference["greedy"] if g["ended"]]
    if not expected:
        detail = "the trained model's own answers do not end either; nothing to compare"
        return Check("generation", "pass", detail)
    ended = same = 0
    for given in expected:
        limit = 2 * len(given["ids"]) + 32
        ids = list(model.generate(given["prompt"], max_new_tokens=limit))
        ended += len(ids) < limit
        same += ids == given["ids"]
    detail = (
        f"{ended} of {len(expected)} greedy answers end by themselves, {same} are the same to the "
        "token"
    )
    if 2 * ended < len(expected):
        return Check("generation", "fail", f"endless generation: {detail}")
    return Check("generation", "pass" if ended == len(expected) else "warn", detail)


# Logits


def check_distance(
    logits_of: LogitsOf, kind: str, reference: dict[str, Any], report: Report
) -> Check:
    """How far the file's logits are from the trained model's, judged by the limits of the weight
    type `kind`.
    """
    measured = distance_to_reference(logits_of, reference)
    report.write({"measured": measured})
    return judge_distance(measured, kind)


def distance_to_reference(logits_of: LogitsOf, reference: dict[str, Any]) -> dict[str, float]:
    """Return {"kl_mean", "kl_p99", "top1", "ppl_ratio", "positions"} over all counted positions.

    KL is KL(trained || file) in nats a token; ppl_ratio is the file's perplexity over the trained
    model's. `logits_of`: gives the logits of one sequence in chunks of (rows, vocabulary).
    """
    trained = np.load(Path(reference["folder"]) / "logits.npy", mmap_mode="r")
    kls, agree, shifts, row = [], [], [], 0
    for sample in reference["sequences"]:
        counted, start = set(sample["counted"]), 0
        for chunk in logits_of(sample["ids"]):
            for i in (i for i in range(len(chunk)) if start + i in counted):
                kl, same, shift = compare_rows(trained[row], chunk[i], sample["ids"][start + i + 1])
                kls.append(kl)
                agree.append(same)
                shifts.append(shift)
                row += 1
            start += len(chunk)
    return {
        "kl_mean": float(np.mean(kls)),
        "kl_p99": float(np.quantile(kls, 0.99)),
        "top1": float(np.mean(agree)),
        "ppl_ratio": math.exp(float(np.clip(np.mean(shifts), -50, 50))),
        "positions": len(kls),
    }


def compare_rows(trained: np.ndarray, found: np.ndarray, target: int) -> tuple[float, bool, float]:
    """Return (KL(trained || found), same most likely token, how much less likely `target` became,
    in nats).

    Columns that only one of the two has (a padded embedding) are left out.
    """
    width = min(len(trained), len(found))
    p, q = trained[:width].astype(np.float64), found[:width].astype(np.float64)
    p -= p.max() + np.log(np.exp(p - p.max()).sum())
    q -= q.max() + np.log(np.exp(q - q.max()).sum())
    return (
        float((np.exp(p) * (p - q)).sum()),
        bool(p.argmax() == q.argmax()),
        float(p[target] - q[target]),
    )


# Folders


def check_folder(job: dict[str, Any], reference: dict[str, Any], report: Report) -> None:
    """All checks of an adapter folder (plain peft on the base) or a merged model (plain
    transformers).
    """
    from fastft.verification.reference import load_tokenizer, load_trained

    path, loaded = job["path"], []

    is_adapter = job["kind"] == "adapter"
    base, adapter = (job["base"], path) if is_adapter else (path, None)

    def load() -> Check:
        try:
            loaded.extend([load_trained(base, adapter)[0], load_tokenizer(base, adapter)])
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            # Whatever the libraries say about a broken folder is the finding.
            return Check("load", "fail", f"{type(error).__name__}: {str(error)[:500]}")
        how = "plain peft loads it on the base" if is_adapter else "plain transformers loads it"
        return Check("load", "pass", how)

    if report.run("load", load).verdict == "fail":
        return
    report.run("tokens", lambda: check_folder_tokenizer(loaded[1], reference))
    kind = "f32" if is_adapter else stored_type(path)
    logits = partial(folder_logits, loaded[0])
    report.run("distance", lambda: check_distance(logits, kind, reference, report))


def folder_logits(model: Any, ids: list[int]) -> Iterator[np.ndarray]:
    """Yield the float32 logits of one sequence, (tokens, vocabulary), in one piece."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        yield logits.float().cpu().numpy()


def stored_type(path: str) -> str:
    """Return "f32", "f16" or "bf16": the type of a model folder's weights, from its config."""
    config = read_json(Path(path) / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return {"float16": "f16", "bfloat16": "bf16"}.get(name, "f32")


def check_folder_tokenizer(tokenizer: Any, reference: dict[str, Any]) -> Check:
    """The tokenizer that lies in a folder gives the trained one's ids and conversations."""
    from fastft.verification.reference import render_chat

    for _, text, expected, add_special in token_cases(reference):
        found = tokenizer(text, add_special_tokens=add_special)["input_ids"]
        if found != expected:
            return Check("tokens", "fail", f"{text[:40]!r}: {around(found, expected)}")
    for chat in reference["chats"]:
        text = render_chat(tokenizer, chat["messages"], chat["add_generation_prompt"])["text"]
        if text != chat["text"]:
            detail = f"the folder's chat template renders {text!r} instead of {chat['text']!r}"
            return Check("tokens", "fail", detail)
    detail = f"{len(reference['texts'])} texts, {len(reference['chats'])} conversations"
    return Check("tokens", "pass", detail)


if __name__ == "__main__":
    main()
