#!/usr/bin/env bash
# Wheels that a CUDA machine with torch, triton and transformers still lacks, for scripts/gpu_check.sh to take along:
# flash-linear-attention and all that the server needs.
#
#   bash scripts/gpu_wheels.sh [FOLDER]     default: wheels/ in the checkout
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/wheels}
python=${PYTHON:-python3}
packages=(
    flash-linear-attention fla-core einops
    msgspec pyzmq
    fastapi starlette anyio idna typing-extensions annotated-doc opentelemetry-api
    pydantic pydantic-core annotated-types typing-inspection pydantic-settings python-dotenv
    uvicorn httptools uvloop h11 click
    typer rich shellingham markdown-it-py mdurl pygments
    httpx httpcore certifi prometheus-client
)

requirements=()
for package in "${packages[@]}"; do
    requirements+=("$(grep -iE "^${package//-/[-_]}==" "$root/constraints.txt")")
done
mkdir -p "$folder"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --dest "$folder" "${requirements[@]}"
du -ch "$folder"/*.whl | tail -1
