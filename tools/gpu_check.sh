#!/usr/bin/env bash
# On a machine with a GPU and no network: is everything exact, does it fit as planned, how fast is it.
# Ten minutes at most, five files of results. Run it in a clone of this repository.
#   usage: tools/gpu_check.sh WHEELS RESULTS [CASE...]      (WHEELS: what tools/gpu_bundle.sh collected;
#          "-" where everything is installed already; CASE: benchmark cases, default h100's 1B)
set -uo pipefail
wheels=$1 results=$2
shift 2
cases=("${@:-h100-llama3.2-1b-lora}")
started=$SECONDS
mkdir -p "$results"
export UNSLOTH_AUTO_INSTALL=0 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ "$wheels" != - ]; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl || exit 3
  export PYTHONPATH="$site:$PWD"
else
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
${PYTHON:-python3} -m fastft selftest --minutes "${SELFTEST_MINUTES:-4.5}" --out "$results" >"$results/selftest.log" 2>&1
code=$?
for case in "${cases[@]}"; do
  left=$((${TOTAL_SECONDS:-570} - (SECONDS - started)))
  [ "$left" -lt 60 ] && break
  timeout "$left" ${PYTHON:-python3} -m fastft bench --case "$case" --arms peft,unsloth,fastft --tables defaults \
    --repeats 2 --out "$results/bench" >>"$results/bench.log" 2>&1
  # Results alone go back: the arms' logs are many files.
  mv "$results"/bench/*.json "$results"/ 2>/dev/null
done
rm -rf "$results/bench"
tail -n 60 "$results/selftest.log"
exit "$code"
