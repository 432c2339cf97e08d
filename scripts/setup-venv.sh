#!/usr/bin/env bash
# Makes the virtual environment at $1 with the pinned CPU stack, the tools and the package itself.
# PYTHON picks the interpreter, TORCH_INDEX the fallback index for the CPU build of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
torch_index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null
}

python=${PYTHON:-}
if [[ -z $python ]]; then
    for candidate in python3 python3.11 python3.12 python3.13 python3.14; do
        if fits "$candidate"; then python=$candidate && break; fi
    done
fi
if [[ -z $python ]] || ! fits "$python"; then
    found=$("${python:-python3}" --version 2>/dev/null) || found="no ${python:-python3}"
    echo "setup: Python 3.11 to 3.14 is needed, found: $found. Install one, or name it:" \
        "make setup PYTHON=/path/to/python3.11" >&2
    exit 1
fi

if ! fits "$venv/bin/python"; then
    "$python" -m venv --clear "$venv" || {
        echo "setup: $python -m venv failed; on Debian and Ubuntu install python3-venv" >&2
        exit 1
    }
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
install=("${pip[@]}" install -qq --no-deps)

is_cpu_torch() {
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' 2>/dev/null
}

without_cpu_torch() {
    echo "setup: $venv holds no working CPU build of torch; name an index that has $torch+cpu:" \
        "make setup TORCH_INDEX=URL" >&2
    exit 1
}

# Only the CPU build has the local version +cpu, so a CUDA build is never downloaded for nothing.
# macOS has no other build than the CPU's, under the plain version.
torch=$(sed -n 's/^torch==/torch==/p' requirements/cpu.txt)
if [[ $(uname -s) != Darwin ]] && ! is_cpu_torch; then
    echo "setup: $torch+cpu"
    "${install[@]}" "$torch+cpu" 2>/dev/null ||
        "${install[@]}" --index-url "$torch_index" "$torch+cpu" || without_cpu_torch
fi

echo "setup: requirements/cpu.txt, requirements/dev.txt (a few minutes the first time)"
"${install[@]}" -r requirements/cpu.txt -r requirements/dev.txt
"${install[@]}" --no-build-isolation --editable .

is_cpu_torch || without_cpu_torch
"$venv/bin/python" -c "import vllm; from transformers import AutoTokenizer, Qwen3ForCausalLM"
