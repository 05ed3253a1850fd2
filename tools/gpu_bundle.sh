#!/usr/bin/env bash
# Collects, into FOLDER (default .whl), the wheels that the GPU path needs on an x86-64 Linux machine
# without a network, whose python3 is 3.12 and already holds torch (CUDA 13), transformers 5.17, peft,
# accelerate and triton. About 25 MB: unsloth goes without its web studio, bitsandbytes with its
# CUDA 13 library alone. EXTRA_WHEELS="xformers==0.0.35" adds more (xformers is 100 MB and makes rows
# without padding one kernel call instead of one for each length).
#   usage: tools/gpu_bundle.sh [FOLDER], then on the other machine: tools/gpu_check.sh FOLDER RESULTS
set -euo pipefail
out=${1:-.whl}
mkdir -p "$out"
platforms=()
for p in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
  platforms+=(--platform "${p}_x86_64")
done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" -d "$out" \
  "unsloth==2026.10.9" "unsloth_zoo==2026.10.9" "trl==1.15.0" "datasets==4.8.5" "bitsandbytes==0.50.2" \
  "liger-kernel==0.8.5" "torchao==0.18.0" cut_cross_entropy tyro typeguard docstring_parser msgspec \
  hf_transfer dill multiprocess gguf shtab structlog json5 nest-asyncio typer rich shellingham \
  markdown-it-py mdurl pygments click pydantic pydantic-core annotated-types typing-inspection \
  ${EXTRA_WHEELS:-}
python3 - "$out" <<'PY'
"""Repack the two large wheels without what the GPU path never loads."""
import pathlib, re, sys, zipfile

def repack(path, keep):
    slim = path.with_suffix(".slim")
    with zipfile.ZipFile(path) as src, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as dst:
        for item in src.infolist():
            if item.filename.endswith("/RECORD"):
                rows = src.read(item).decode().splitlines()
                dst.writestr(item, "\n".join(r for r in rows if keep(r.split(",")[0])) + "\n")
            elif keep(item.filename):
                dst.writestr(item, src.read(item))
    slim.replace(path)

folder = pathlib.Path(sys.argv[1])
for wheel in folder.glob("unsloth-*.whl"):
    repack(wheel, lambda name: not name.startswith("studio/"))
for wheel in folder.glob("bitsandbytes-*.whl"):
    repack(wheel, lambda name: not re.search(r"libbitsandbytes_(?!cuda130|cpu)", name))
PY
du -sh "$out"
