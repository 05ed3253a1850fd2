"""ggml's quantisation, called directly, and which tensor gets which type.

`ggml_quantize_chunk` is public and thread-safe, and ctypes releases the GIL while it runs. It is
compared with `llama_model_quantize` at first use for each build of llama.cpp. The mixture of types
in a file is llama.cpp's own: a dry run on a sparse file that has the header and no data.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import FastFTError, one_of
from fastft.exporting.gguf.isolated import INSTALL, run_isolated
from fastft.files.scratch import scratch

if TYPE_CHECKING:
    import numpy as np

# llama.cpp's numbers for kinds of files (llama.h, enum llama_ftype)
FILE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q5_0": 8, "q6_k": 18, "q5_k_m": 17,
    "q5_k_s": 16, "q4_k_m": 15, "q4_k_s": 14, "q3_k_l": 13, "q3_k_m": 12, "q3_k_s": 11, "q2_k": 10,
    "iq4_xs": 30, "iq4_nl": 25, "iq3_m": 27, "iq3_s": 26, "iq3_xs": 22, "iq3_xxs": 23, "iq2_m": 29,
    "iq2_s": 28, "iq2_xs": 20, "iq2_xxs": 19,
}  # fmt: skip
UNQUANTIZED = ("f32", "f16", "bf16")
# A file type whose main tensor type is this one, to compare the two ways of quantising.
CHECKED_BY = {
    "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q8_0": 7, "q2_k": 10, "q3_k": 11, "q4_k": 14,
    "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "iq3_s": 26, "iq3_xxs": 23, "iq2_xxs": 19,
    "iq2_xs": 20, "iq2_s": 29,
}  # fmt: skip
NEEDS_IMATRIX = {"iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"}
EMBEDDINGS = {"token_embd.weight", "output.weight"}


class Ggml:
    """ggml's types and quantisation through ctypes. Raises FastFTError where llama-cpp-python is
    not installed.
    """

    def __init__(self) -> None:
        import importlib.util

        import gguf

        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or not spec.origin:
            raise FastFTError(INSTALL)
        folder = Path(spec.origin).parent / "lib"
        names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll", "libggml-base.dll")
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            raise FastFTError(f"{folder} has no ggml-base library; reinstall llama-cpp-python.")
        self.path = found
        lib = ctypes.CDLL(str(found))
        self._quantize = lib.ggml_quantize_chunk
        self._quantize.restype = ctypes.c_size_t
        pointer, long = ctypes.c_void_p, ctypes.c_int64
        self._quantize.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
        self._requires = lib.ggml_quantize_requires_imatrix
        self._requires.argtypes, self._requires.restype = [ctypes.c_int], ctypes.c_bool
        self._numbers = {t.name.lower(): int(t) for t in gguf.GGMLQuantizationType}

    def requires_imatrix(self, name: str) -> bool:
        """Return whether rows of this type cannot be quantised without an importance matrix."""
        return bool(self._requires(self._numbers[name]))

    def quantize(
        self, name: str, rows: np.ndarray, imatrix: np.ndarray | None = None
    ) -> np.ndarray:
        """Return float32 `rows` (rows, row length) as bytes of tensor type `name`; `imatrix` is
        (row length,).
        """
        import numpy

        assert rows.dtype == numpy.float32
        assert rows.flags.c_contiguous
        count, length = rows.shape
        out = numpy.empty(count * row_bytes(name, length), dtype=numpy.uint8)
        weights = None if imatrix is None else numpy.ascontiguousarray(imatrix, dtype=numpy.float32)
        pointer = None if weights is None else weights.ctypes.data
        number = self._numbers[name]
        written = self._quantize(
            number, rows.ctypes.data, out.ctypes.data, 0, count, length, pointer
        )
        assert written == out.nbytes, f"{name}: {written} bytes of {out.nbytes}"
        return out


def row_bytes(name: str, length: int) -> int:
    """Return the bytes of `length` values of tensor type `name`."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[type_number(name)]
    assert length % block == 0, f"{length} values in {name}"
    return length // block * size


def type_number(name: str) -> Any:
    """Return gguf's enum member of tensor type `name`, such as q4_k."""
    import gguf

    return gguf.GGMLQuantizationType[name.upper()]


def check_types(types: list[str], has_imatrix: bool) -> list[str]:
    """Return `types` in lower case, each known; FastFTError for unknown ones and those that need
    an imatrix.
    """
    found = [t.lower() for t in types]
    for name in found:
        if name not in FILE_TYPES:
            raise one_of("GGUF type", name, FILE_TYPES)
        if name.startswith(("iq2", "iq3_xxs")) and not has_imatrix:
            raise FastFTError(
                f"{name} needs an importance matrix: at so few bits, llama.cpp must know "
                "which weights matter. Add "
                "--imatrix auto (collected from the run's own data), or choose q2_k or q3_k_m."
            )
    return list(dict.fromkeys(found))


def plan_types(
    shadow_header: bytes,
    shadow_bytes: int,
    tensors: list[tuple[str, tuple[int, ...]]],
    types: list[str],
    imatrix: bool,
) -> dict[str, dict[str, str]] | None:
    """Return for each file type the tensor types that llama.cpp chooses; None where it cannot be
    asked.

    `shadow_header` describes the model in 16 bit; a sparse file of `shadow_bytes` stands in for it.
    """
    found = {
        name: {t: unquantized(name, t, shape) for t, shape in tensors}
        for name in types
        if name in UNQUANTIZED
    }
    asked = [name for name in types if name not in UNQUANTIZED]
    if not asked:
        return found
    with scratch("fastft-gguf-") as work:
        path = work / "shadow.gguf"
        with open(path, "wb") as file:
            file.write(shadow_header)
            file.truncate(shadow_bytes)
        answers, _ = run_isolated(
            do="plan", path=str(path), ftypes=[FILE_TYPES[t] for t in asked], imatrix=imatrix
        )
    for name, answer in zip(asked, answers, strict=False):
        if set(answer["types"]) == {t for t, _ in tensors}:
            found[name] = answer["types"]
    return found if len(found) == len(types) else None


ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", ".bias")


def unquantized(file_type: str, tensor: str, shape: tuple[int, ...]) -> str:
    """Return the type of a tensor in a file of f32, f16 or bf16: vectors, norms, routers and
    biases stay in float32.
    """
    return "f32" if len(shape) < 2 or tensor.endswith(ALWAYS_F32) else file_type


def agrees(ggml: Ggml, types: set[str]) -> bool:
    """Return whether `ggml_quantize_chunk` gives llama.cpp's own bytes for all `types`; kept for
    each build.
    """
    wanted = {t: CHECKED_BY[t] for t in sorted(types) if t not in UNQUANTIZED and t in CHECKED_BY}
    if any(t not in UNQUANTIZED and t not in CHECKED_BY for t in types):
        return False
    stat = ggml.path.stat()
    cache = cache_folder() / f"quantize-check-{stat.st_size}-{int(stat.st_mtime)}.json"
    known = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}
    left = {t: number for t, number in wanted.items() if t not in known}
    if left:
        answers, _ = run_isolated(do="check", types=left)
        known |= dict.fromkeys(left, False) | {answer["type"]: answer["same"] for answer in answers}
        cache.parent.mkdir(parents=True, exist_ok=True)
        beside = cache.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(known), encoding="utf-8")
        beside.replace(cache)
    return all(known[t] for t in wanted)


def cache_folder() -> Path:
    """Return the folder that keeps what is fetched or found out once: ~/.cache/fastft, below
    XDG_CACHE_HOME.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastft"
