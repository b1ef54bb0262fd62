#!/usr/bin/env bash
# bench/gpu_check.sh FOLDER: builds, tests and times the GPU kernels on a machine with one NVIDIA GPU and no network.
# Needs Python with torch, triton, pybind11, scikit-build-core, pytest, hypothesis, and cmake, ninja, nvcc. Under 9 minutes.
# FOLDER gets build.log, tests.log, sanitizer.log, results.jsonl, table.txt, and proven.json for python/ihvp/ops/.
set -euo pipefail

folder=$(mkdir -p "${1:?usage: bench/gpu_check.sh FOLDER}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
    echo "bench/gpu_check.sh needs a CUDA device, and torch sees none" >&2
    exit 1
}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

"$python" -m pip install --no-build-isolation --no-deps --target "$site" . > "$folder/build.log" 2>&1
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
cd tests
"$python" -m ihvp info | tee "$folder/table.txt"

# The warnings of other torch versions are not this test's matter.
passed=
if timeout 200 "$python" -m pytest -m gpu -W default -p no:cacheprovider --rootdir .. -c ../pyproject.toml . \
    > "$folder/tests.log" 2>&1; then
    passed=--passed
fi
tail -n 3 "$folder/tests.log" | tee -a "$folder/table.txt"

sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
    # Small sizes, the CUDA kernels alone; torch's caching allocator would hide what lies between its blocks.
    for tool in memcheck racecheck; do
        if ! PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 50 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest -m gpu -W default -p no:cacheprovider --rootdir .. -c ../pyproject.toml test_gpu.py \
            -k "cuda and (tiles or float32) and not vector" >> "$folder/sanitizer.log" 2>&1; then
            passed=
            echo "compute-sanitizer $tool: failed, see sanitizer.log" | tee -a "$folder/table.txt"
        else
            echo "compute-sanitizer $tool: clean" | tee -a "$folder/table.txt"
        fi
    done
else
    echo "compute-sanitizer: not on this machine" | tee -a "$folder/table.txt"
fi

cd ..
timeout 90 "$python" -m bench gpu $passed --output "$folder/results.jsonl" --proven "$folder/proven.json" 2>&1 |
    tee -a "$folder/table.txt"
timeout 120 "$python" -m bench gpu-pipeline --output "$folder/results.jsonl" 2>&1 | tee -a "$folder/table.txt"
test -n "$passed"
