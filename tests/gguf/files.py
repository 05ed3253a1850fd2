"""Changed copies of GGUF files, for tests that want a file to be wrong in exactly one way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def with_fields(path: Path, out: Path, **changes: Any) -> Path:
    """Copy a file with other metadata; "__" in a name stands for a dot, None removes the key."""
    reader = gguf.GGUFReader(path)
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = changes.get(field.name, field.contents())
        if value is not None:
            writer.add_key_value(
                field.name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def with_tensor(
    path: Path, out: Path, name: str, change: Callable[[np.ndarray], np.ndarray]
) -> Path:
    """Copy a file in which the float32 tensor `name` is `change` of itself."""
    shutil.copy(path, out)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    changed = change(np.array(tensor.data)).astype(np.float32)
    assert changed.nbytes == tensor.n_bytes
    with out.open("r+b") as file:
        file.seek(tensor.data_offset)
        file.write(changed.tobytes())
    return out
