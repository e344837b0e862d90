#!/usr/bin/env bash
# The wheels that a bare GPU machine lacks, for Python 3.12 on Linux x86-64, and their sizes.
#
#     scripts/gpu_wheels.sh FOLDER [PYTHON]
#
# Run it where there is a network and Rust; PYTHON (default: python3) has pip 23 or later and may be of another version.
# Carry the checkout and FOLDER to the machine, and there:
#
#     python3 -m pip install --no-index --no-deps --target site FOLDER/*.whl && export PYTHONPATH=$PWD/site
#
# Not among them, since it is large and expected there: jax for CUDA, flax, optax, orbax-checkpoint, transformers, torch,
# and pyarrow (which `datasets` cannot do without), pandas, scipy and matplotlib, with what they need themselves.
set -euo pipefail
folder=${1:?usage: scripts/gpu_wheels.sh FOLDER [PYTHON]}
python=${2:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -f "$folder"/*.whl # of an earlier time: two versions of one package cannot be installed

pip() { "$python" -m pip "$@" --quiet --disable-pip-version-check --no-deps; }

platforms=()
for libc in 39 34 31 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${libc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
packages=(
    "grain>=0.2.18" array-record portpicker
    "ml-collections>=1.1"
    "datasets>=4" dill multiprocess
    "wfdb>=4.3" soundfile cffi pycparser
    "nltk>=3.9" defusedxml
)
pip download -d "$folder" --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" "${packages[@]}"
pip wheel -w "$folder" "rouge-score>=0.1.2" # published as source alone; pure Python
pip wheel -w "$folder" "$root" # ours: one wheel for Python 3.11 and later (abi3)

du -k "$folder"/*.whl | while read -r size file; do printf '%8.1f MiB  %s\n' "$(bc -l <<<"$size/1024")" "${file##*/}"; done
total=$(du -kc "$folder"/*.whl | tail -1 | cut -f1)
printf '%8.1f MiB  in all\n' "$(bc -l <<<"$total/1024")"
if ((total > 64 * 1024)); then
    echo "error: $folder holds more than the 64 MiB that can be carried" >&2
    exit 2
fi
