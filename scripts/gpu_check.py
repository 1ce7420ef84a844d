"""Is this GPU right, and how fast is it? One command on a machine with CUDA, no network needed.

    python scripts/gpu_check.py [--out gpu_check.json]

Makes a checkpoint with random weights in a temporary directory, loads it on the GPU and on the CPU, compares prefill,
decode and the engine's greedy tokens in float32, then times decode steps in bfloat16, dense against half the key
channels. Prints one table and writes JSON. `--device cpu` runs the same checks without a GPU, to test the script.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modeling.checkpoint import Checkpoint, export_tensors, write_json, write_safetensors
from modeling.families import family_of
from modeling.model import Model
from modeling.state import StatePool
from server.engine.cache import StateCache
from server.engine.engine import Engine
from server.engine.messages import Generate, Sampling
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler

TOLERANCE = 1e-3
"""Relative, float32 on both sides: the GPU's products round differently."""


def config(family: str, *, hidden: int, layers: int, heads: int, d_k: int, vocab: int) -> dict[str, Any]:
    common = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    if family == "delta_net":
        return {**common, "expand_k": d_k * heads / hidden, "expand_v": 128 * heads / hidden}
    return {**common, "head_dim": d_k, "expand_v": 128 / d_k}


def make_checkpoint(path: Path, settings: dict[str, Any]) -> Checkpoint:
    """Random weights of the given shape, on disk."""
    torch.manual_seed(0)
    path.mkdir()
    family = family_of(settings)
    model = Model(family.spec(settings))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.5 if name.endswith("conv.weight") else p.shape[1] ** -0.5)
        elif not name.endswith("norm.weight"):
            torch.nn.init.normal_(p, std=0.2)
    write_json(path / "config.json", settings)
    write_safetensors(path, export_tensors(model, family))
    return Checkpoint(path)


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    b = b.cpu().float()
    return float((a.cpu().float() - b).abs().max() / b.abs().max())


def greedy(model: Model, device: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What the engine generates for several requests at once, steps overlapped."""
    pool = StatePool(model.spec, len(prompts), device=device)
    engine = Engine(Scheduler(StateCache(pool), prefill_tokens=256), Runner(model, pool), depth=1)
    sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
    for i, prompt in enumerate(prompts):
        engine.handle(
            Generate(
                request_id=str(i),
                token_ids=prompt,
                max_tokens=max_tokens,
                sampling=sampling,
                stop_token_ids=[],
            )
        )
    tokens: list[list[int]] = [[] for _ in prompts]
    while not engine.idle:
        output = engine.step()
        for token in output.tokens if output else []:
            tokens[int(token.request_id)].append(token.token_id)
    return tokens


@torch.inference_mode()
def check_parity(checkpoint: Checkpoint, device: str) -> dict[str, Any]:
    """Prefill, decode and greedy tokens on the device against the CPU, float32."""
    ours, reference = checkpoint.load(device=device), checkpoint.load()
    ids = torch.randint(0, checkpoint.spec.vocab_size, (200,))
    cu_seqlens = [0, 65, 129, 200]
    expected, state = reference(ids, cu_seqlens)
    actual, device_state = ours(ids.to(device), cu_seqlens)
    prefill = difference(ours.logits(actual), reference.logits(expected))
    pools = []
    for where, final in (("cpu", state), (device, device_state)):
        pool = StatePool(checkpoint.spec, 4, device=where)
        pool.scatter(torch.arange(3, device=where), final)
        pools.append(pool)
    slots = torch.arange(3)
    decode = max(
        difference(
            ours.logits(ours.decode(ids[t : t + 3].to(device), pools[1], slots.to(device))),
            reference.logits(reference.decode(ids[t : t + 3], pools[0], slots)),
        )
        for t in range(8)
    )
    prompts = [ids[:n].tolist() for n in (5, 64, 130, 200)]
    same = greedy(ours, device, prompts, 16) == greedy(reference, "cpu", prompts, 16)
    return {"prefill": prefill, "decode": decode, "greedy_tokens_equal": same}


@torch.inference_mode()
def time_decode(checkpoint: Checkpoint, device: str, batch: int) -> dict[str, float]:
    """Median decode step of a full batch in bfloat16 weights, float32 state."""
    model = checkpoint.load(dtype=torch.bfloat16, device=device)
    pool = StatePool(checkpoint.spec, batch, device=device, conv_dtype=torch.bfloat16)
    slots = torch.arange(batch, device=device)
    seconds: list[float] = []
    for _ in range(15):
        ids = torch.randint(0, checkpoint.spec.vocab_size, (batch,), device=device)
        synchronise(device)
        began = time.perf_counter()
        model.logits(model.decode(ids, pool, slots)).argmax(-1)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[5:])
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "step_ms": step * 1e3,
        "tokens_per_second": batch / step,
        "gigabytes_per_second": (weights + 2 * batch * pool.bytes_per_slot) / step / 1e9,
        "state_bytes_per_request": pool.bytes_per_slot,
    }


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="time tiny shapes (to test the script on a CPU)")
    arguments = parser.parse_args()
    device: str = arguments.device
    console = Console()
    if device != "cpu" and not torch.cuda.is_available():
        console.print("gpu_check: torch finds no CUDA device here; nothing was checked")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "parity": {}, "decode": {}}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        table = Table(
            "family", "d_k", "prefill", "decode", "greedy tokens", title=f"parity with the CPU, {name}"
        )
        for family in ("gated_deltanet", "delta_net"):
            for d_k in (128, 64, 48):
                settings = config(family, hidden=256, layers=3, heads=2, d_k=d_k, vocab=1000)
                result = check_parity(make_checkpoint(Path(folder) / f"{family}-{d_k}", settings), device)
                good = max(result["prefill"], result["decode"]) < TOLERANCE and result["greedy_tokens_equal"]
                failed |= not good
                equal = "equal" if result["greedy_tokens_equal"] else "DIFFER"
                table.add_row(family, str(d_k), f"{result['prefill']:.1e}", f"{result['decode']:.1e}", equal)
                report["parity"][f"{family}/{d_k}"] = result
        console.print(table)

        size = (
            {"hidden": 256, "layers": 2, "heads": 2, "vocab": 1000}
            if arguments.small
            else {"hidden": 2048, "layers": 24, "heads": 16, "vocab": 32000}
        )
        table = Table("d_k", "batch", "step ms", "tokens/s", "GB/s", "state MB", title="decode, bf16 weights")
        for d_k in (128, 64):
            checkpoint = make_checkpoint(
                Path(folder) / f"timed-{d_k}", config("gated_deltanet", d_k=d_k, **size)
            )
            for batch in (1, 8) if arguments.small else (1, 32, 128, 512):
                figures = time_decode(checkpoint, device, batch)
                report["decode"][f"{d_k}/{batch}"] = figures
                table.add_row(
                    str(d_k),
                    str(batch),
                    f"{figures['step_ms']:.2f}",
                    f"{figures['tokens_per_second']:.0f}",
                    f"{figures['gigabytes_per_second']:.0f}",
                    f"{figures['state_bytes_per_request'] / 1e6:.1f}",
                )
        console.print(table)
    report["passed"] = not failed
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print("passed" if not failed else f"FAILED: a difference above {TOLERANCE}, or other tokens")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
