#!/usr/bin/env bash
# bench/gpu_check.sh FOLDER: builds, tests and times the GPU kernels on a machine with one NVIDIA GPU and no network.
# Needs Python with torch, triton, pybind11, scikit-build-core, pytest, hypothesis, and cmake, ninja, nvcc.
# FOLDER gets a log of each step, results.jsonl, table.txt with what is worth reading, and proven.json for
# python/ihvp/ops/. Every step has its own limit, less than nine minutes in all, the most valuable first; one that fails
# or runs out of time leaves its log, and the others run. Exits 1 when a step failed, 2 when there is nothing to run on.
set -uo pipefail

folder=$(mkdir -p "${1:?usage: bench/gpu_check.sh FOLDER}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
table=$folder/table.txt
failed=0
results=$folder/results.jsonl
: > "$table"
rm -f "$results" "$folder/proven.json"  # of an earlier check

# step NAME SECONDS COMMAND...: runs the command with its output in NAME.log; one line of summary.
step() {
    local name=$1 limit=$2 status=0 start=$SECONDS said=passed
    shift 2
    timeout --kill-after=2 "$limit" "$@" > "$folder/$name.log" 2>&1 || status=$?
    if [ "$status" -ne 0 ]; then
        said="FAILED with status $status, see $name.log"
        if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then said="FAILED: over its limit of $limit s, see $name.log"; fi
        failed=1
    fi
    printf '%-16s%5d s  %s\n' "$name" "$((SECONDS - start))" "$said" | tee -a "$table"
    return "$status"
}

# Lines worth reading, here and in the table.
shown() { tee -a "$table"; }

step device 30 "$python" -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'torch sees no CUDA device')" || {
    echo "bench/gpu_check.sh needs a CUDA device: $(tail -n 1 "$folder/device.log")" >&2
    exit 2
}
site=$(mktemp -d) || exit 2
trap 'rm -rf "$site"' EXIT
step build 90 "$python" -m pip install --no-build-isolation --no-deps --target "$site" . || exit 1
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
step info 20 "$python" -m ihvp info
shown < "$folder/info.log"

# The warnings of other torch versions are not this test's matter.
pytest=("$python" -m pytest -m gpu -W default -p no:cacheprovider --rootdir .. -c ../pyproject.toml)
parallel=()
if "$python" -c "import xdist" 2> /dev/null; then parallel=(-n 8); fi  # compiling kernels is most of it
passed=
step tests 95 env -C tests "${pytest[@]}" "${parallel[@]}" . && passed=--passed
tail -n 3 "$folder/tests.log" | shown

step ops 120 "$python" -m bench gpu $passed --output "$results" --proven "$folder/proven.json"
shown < "$folder/ops.log"
step small-layers 25 "$python" -m bench small-layers --device cuda --output "$results"
shown < "$folder/small-layers.log"
step pipeline 95 "$python" -m bench pipeline --device cuda --output "$results"
shown < "$folder/pipeline.log"

# Small sizes, the CUDA kernels alone; torch's caching allocator would hide what lies between its blocks.
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 20 env -C tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${pytest[@]}" test_gpu.py -k "cuda and (narrow or float32)" || rm -f "$folder/proven.json"
    done
else
    echo "compute-sanitizer: not on this machine" | shown
fi
exit "$failed"
