"""One job for llama.cpp, in a process that it may end.

This module as a child process reads the job as JSON from standard input and writes
its answers as JSON to standard output, a line each. `isolated.run_isolated` is the other side.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fastft.files.scratch import scratch

TENSOR_LINE = re.compile(
    r"\[ *\d+/ *\d+\] (\S+) +- \[[^\]]*\], type = +(\S+), size = +[\d.]+ MiB"
    r"(?: -> +[\d.]+ MiB \((\S+)\))?"
)


_callbacks: list[Any] = []


def main() -> None:
    """Do the job on standard input."""
    job = json.load(sys.stdin)
    jobs: dict[str, Callable[..., Iterator[Any]]] = {
        "probe": probe,
        "plan": plan,
        "check": check,
        "quantize": quantize,
    }
    for answer in jobs[job.pop("do")](**job):
        print(json.dumps(answer), flush=True)


class Api:
    """llama-cpp-python with llama.cpp's log kept in `log`."""

    def __init__(self) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.log: list[str] = []

        @llama_cpp.llama_log_callback
        def keep(level: int, text: bytes, data: object) -> None:
            self.log.append(text.decode("utf-8", "replace"))

        _callbacks.append(keep)  # the library calls it as long as the process lives
        llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()


def probe(
    path: str, names: list[str], texts: list[str], expected: list[list[int]]
) -> Iterator[list[Any]]:
    """Yield [name, texts with the expected ids] for each splitting rule's name, up to the first
    that gets all.
    """
    api = Api().lib
    for name in names:
        params = api.llama_model_default_params()
        params.vocab_only = True
        override = (api.llama_model_kv_override * 2)()
        override[0].tag = api.LLAMA_KV_OVERRIDE_TYPE_STR
        override[0].key = b"tokenizer.ggml.pre"
        override[0].value.val_str = name.encode()
        params.kv_overrides = override
        model = api.llama_model_load_from_file(path.encode(), params)
        if not model:
            yield [name, 0]
            continue
        vocab = api.llama_model_get_vocab(model)
        right = sum(
            tokenize(api, vocab, text) == ids for text, ids in zip(texts, expected, strict=True)
        )
        api.llama_model_free(model)
        yield [name, right]
        if right == len(texts):
            return


def tokenize(api: Any, vocab: Any, text: str) -> list[int]:
    """Return llama.cpp's token ids of `text`, with nothing added and special tokens not parsed."""
    data = text.encode("utf-8")
    buffer = (ctypes.c_int32 * (len(data) + 8))()
    count = api.llama_tokenize(vocab, data, len(data), buffer, len(buffer), False, False)
    return list(buffer[: max(count, 0)])


def plan(path: str, ftypes: list[int], imatrix: bool) -> Iterator[dict[str, Any]]:
    """Yield for each file type the tensor types that llama.cpp would choose for the file `path`,
    by a dry run.
    """
    api = Api()
    for ftype in ftypes:
        params = api.lib.llama_model_quantize_default_params()
        params.ftype, params.dry_run, params.nthread = ftype, True, 1
        keep = _imatrix(api.lib, {"any": [1.0]} if imatrix else {}, params)
        api.log.clear()
        failed = api.lib.llama_model_quantize(path.encode(), b"", ctypes.byref(params))
        text = "".join(api.log)
        del keep
        types = {name: (new or old).lower() for name, old, new in TENSOR_LINE.findall(text)}
        yield {
            "ftype": ftype,
            "types": types,
            "failed": bool(failed),
            "log": text[-500:] if failed else "",
        }


def quantize(
    source: str, out: str, ftype: int, threads: int, imatrix: str | None, max_buf_size: int
) -> Iterator[dict[str, Any]]:
    """Quantise a 16-bit file with llama.cpp itself; `imatrix` is an .npz file of one array a
    tensor.
    """
    import numpy

    api = Api()
    params = api.lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.max_buf_size = ftype, threads, max_buf_size
    arrays = dict(numpy.load(imatrix)) if imatrix else {}
    keep = _imatrix(api.lib, arrays, params)
    failed = api.lib.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    del keep
    yield {"failed": bool(failed), "log": "".join(api.log)[-1000:] if failed else ""}


def check(types: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yield for each tensor type whether `ggml_quantize_chunk` writes what `llama_model_quantize`
    writes.

    `types`: tensor type to a file type whose main type it is. Compared byte by byte on random
    rows, with and without an importance matrix.
    """
    import gguf
    import numpy

    from fastft.exporting.gguf.quantize import Ggml
    from fastft.exporting.gguf.writer import header_bytes

    random = numpy.random.default_rng(0)
    rows = random.standard_normal((64, 512)).astype(numpy.float32)
    weights = numpy.square(random.standard_normal(512)).astype(numpy.float32) + 0.01
    ggml, api = Ggml(), Api()
    with scratch("fastft-gguf-") as work:
        source, out = work / "source.gguf", work / "out.gguf"
        head, _ = header_bytes("llama", tiny_fields(), [("token_embd.weight", rows.shape, "f32")])
        source.write_bytes(head + rows.tobytes())
        for name, ftype in types.items():
            same = True
            for imatrix in (weights, None):
                if imatrix is None and ggml.requires_imatrix(name):
                    continue
                params = api.lib.llama_model_quantize_default_params()
                params.ftype, params.nthread, params.pure = ftype, 1, True
                keep = _imatrix(
                    api.lib, {} if imatrix is None else {"token_embd.weight": imatrix}, params
                )
                failed = api.lib.llama_model_quantize(
                    str(source).encode(), str(out).encode(), ctypes.byref(params)
                )
                del keep
                theirs = b"" if failed else gguf.GGUFReader(out).get_tensor(0).data.tobytes()
                same = same and theirs == ggml.quantize(name, rows, imatrix).tobytes()
            yield {"type": name, "same": same}


def tiny_fields() -> dict[str, tuple[Any, str]]:
    """Return the metadata of the smallest llama that llama.cpp reads."""
    return {
        "llama.block_count": (1, "UINT32"),
        "llama.context_length": (512, "UINT32"),
        "llama.embedding_length": (512, "UINT32"),
        "llama.attention.head_count": (4, "UINT32"),
        "llama.feed_forward_length": (64, "UINT32"),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, "FLOAT32"),
    }


def _imatrix(api: Any, arrays: dict[str, Any], params: Any) -> list[Any]:
    """Hand importance weights to llama.cpp; what is returned must live until it is done."""
    if not arrays:
        return []
    entries = (api.llama_model_imatrix_data * (len(arrays) + 1))()
    keep: list[Any] = [entries]
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        buffer = (ctypes.c_float * len(values))(*values)
        keep.append(buffer)
        entry.name, entry.size = name.encode(), len(values)
        entry.data = ctypes.cast(buffer, ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(entries, type(params.imatrix))
    return keep


if __name__ == "__main__":
    main()
