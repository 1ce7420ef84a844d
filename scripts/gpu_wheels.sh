#!/usr/bin/env bash
# Wheels that a CUDA machine with torch, triton and transformers still lacks, for scripts/gpu_check.sh to take along: all
# that the server needs, and in stock/ fla's models, which only the checks compare with. They are apart because an engine
# that finds them imports transformers as it starts.
#
#   bash scripts/gpu_wheels.sh [FOLDER]     default: wheels/ in the checkout
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/wheels}
python=${PYTHON:-python3}
packages=(
    fla-core einops
    msgspec pyzmq llguidance
    fastapi starlette anyio idna typing-extensions annotated-doc opentelemetry-api
    pydantic pydantic-core annotated-types typing-inspection pydantic-settings python-dotenv
    uvicorn httptools uvloop h11 click
    typer rich shellingham markdown-it-py mdurl pygments
    httpx httpcore certifi prometheus-client
)

download() {  # FOLDER PACKAGE...: in the pinned versions
    local target=$1 requirements=() package
    shift
    for package in "$@"; do
        requirements+=("$(grep -iE "^${package//-/[-_]}==" "$root/constraints.txt")")
    done
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 --dest "$target" "${requirements[@]}"
}

rm -f "$folder"/*.whl "$folder"/stock/*.whl
download "$folder" "${packages[@]}"
download "$folder/stock" flash-linear-attention
du -ch "$folder"/*.whl "$folder"/stock/*.whl | tail -1
