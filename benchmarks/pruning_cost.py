"""What pruning itself takes: selection of every method, calibration against a plain forward, and a whole 1.3B run.

    python benchmarks/pruning_cost.py selection      # 24 layers x 16 heads x d_k 128, seconds a method
    python benchmarks/pruning_cost.py calibration demo/model
    python benchmarks/pruning_cost.py large /tmp/large --memory 8e9

`selection` draws post-SiLU-like rows, so that Grams are as ill-conditioned as real ones. `calibration` alternates plain
forward passes with ones that collect, and prints the median ratio. `large` writes a sharded checkpoint of the shapes
of delta_net-1.3B with random weights (2.7 GB), calibrates and prunes it with `lowkey-prune`, prints the peak resident
memory of that process, fails if it is above --memory, and removes what it wrote.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import itertools
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lowkey.publishing import write_json
from modeling.checkpoint import open_checkpoint, write_safetensors
from modeling.families import family_of
from pruning.calibration import BATCH, Encoder, bundled_text, cu_seqlens, draw_windows
from pruning.collection import Collector, zeros
from pruning.criteria import CRITERIA, Head
from pruning.statistics import FORWARD

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

LARGE: dict[str, Any] = {
    "architectures": ["DeltaNetForCausalLM"],
    "model_type": "delta_net",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 16,
    "expand_k": 1.0,
    "expand_v": 1.0,
    "hidden_ratio": 4,
    "use_gate": False,
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def heads(layers: int, num_heads: int, d_k: int, hidden: int) -> Iterator[Head]:
    """Heads with statistics of correlated, mostly positive rows."""
    generator = np.random.default_rng(0)

    def rows() -> np.ndarray:
        x = generator.standard_normal((512, d_k)) @ generator.standard_normal((d_k, d_k)) / 8
        return x / (1 + np.exp(-x))

    for layer, h in itertools.product(range(layers), range(num_heads)):
        q, k = rows(), rows()
        unit_q, unit_k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
        yield Head(
            layer,
            h,
            d_k,
            0,
            tokens=len(k),
            statistics={
                "q": q.T @ q,
                "k": k.T @ k,
                "q_sum": q.sum(0),
                "k_sum": k.sum(0),
                "q_normalised": unit_q.T @ unit_q,
                "k_normalised": unit_k.T @ unit_k,
                "x_squares": generator.random(hidden),
                "q_gradient": generator.standard_normal((d_k, hidden)),
                "k_gradient": generator.standard_normal((d_k, hidden)),
                "gate_fisher": generator.random(d_k),
            },
            weights=(
                generator.standard_normal((d_k, hidden), dtype=np.float32),
                generator.standard_normal((d_k, hidden), dtype=np.float32),
            ),
        )


@app.command()
def selection(layers: int = 24, num_heads: int = 16, d_k: int = 128, keep: int = 64) -> None:
    """Seconds of each method for all heads."""
    spent = dict.fromkeys(CRITERIA, 0.0)
    for head in heads(layers, num_heads, d_k, 2048):
        for name, criterion in CRITERIA.items():
            began = time.process_time()
            criterion.select(head, keep)
            spent[name] += time.process_time() - began
    for name, seconds in spent.items():
        print(f"{name:12} {seconds:6.2f} s")
    print(
        f"{'all':12} {sum(spent.values()):6.2f} s of CPU for {layers * num_heads} heads, d_k {d_k} => {keep}"
    )


@app.command()
def calibration(checkpoint: str, rounds: int = 15, length: int = 512) -> None:
    """Time of a forward that collects over that of a plain one, alternating."""
    torch.set_num_threads(1)
    source = open_checkpoint(checkpoint)
    model = source.load()
    windows, _ = draw_windows(Encoder(source), bundled_text("train"), count=BATCH, length=length)
    offsets = cu_seqlens(windows, source.spec.eos_token_ids)
    collector = Collector(zeros(source.spec, FORWARD))

    def seconds(tap: Any) -> float:
        began = time.process_time()
        with torch.no_grad():
            model(windows.flatten(), offsets, tap=tap)
        return time.process_time() - began

    pairs = [(seconds(None), seconds(collector.tap)) for _ in range(rounds + 1)][1:]
    ratios = sorted(collecting / plain for plain, collecting in pairs)
    print(
        f"plain {median(p for p, _ in pairs):.3f} s, collecting {median(c for _, c in pairs):.3f} s of CPU for "
        f"{windows.numel():,} tokens; ratio {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


def write_large(directory: Path) -> None:
    """A checkpoint of delta_net-1.3B's shapes in shards of 1 GB, with a byte tokenizer."""
    directory.mkdir(parents=True)
    family = family_of(LARGE)
    spec = family.spec(LARGE)
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for m in family.tensors(spec):
            for name, rows in zip(m.theirs, m.rows, strict=True):
                if m.role == "norm":
                    yield name, torch.ones(rows, dtype=torch.bfloat16)
                    continue
                columns = spec.hidden_size
                if m.ours.endswith("ffn.out_proj.weight"):
                    columns = spec.layers[0].ffn.intermediate_size
                shape, scale = ((rows, 1, 4), 0.5) if m.role == "filters" else ((rows, columns), 0.02)
                yield name, torch.randn(shape, generator=generator).mul_(scale).to(torch.bfloat16)

    write_json(directory / "config.json", LARGE)
    write_safetensors(directory, tensors(), shard_bytes=10**9)
    vocab = {c: i + 3 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def run_and_watch(arguments: list[str]) -> int:
    """Run `lowkey-prune`; the peak resident bytes of its process."""
    process = subprocess.Popen([sys.executable, "-c", "from pruning.cli import app; app()", *arguments])
    watched, peak = psutil.Process(process.pid), 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code != 0:
        raise SystemExit(code)
    return peak


@app.command()
def large(
    directory: Annotated[Path, typer.Argument(help="Scratch directory, made and removed; needs 6 GB.")],
    method: str = "drrqr",
    keep: int = 64,
    tokens: int = 512,
    window_length: int = 128,
    memory: Annotated[float, typer.Option(help="Bytes that the process may have resident.")] = 8e9,
) -> None:
    """Calibrate and prune a checkpoint of 1.3B parameters end to end."""
    if directory.exists():
        raise SystemExit(f"{directory} exists; name a directory that is to be made")
    try:
        began = time.perf_counter()
        write_large(directory / "dense")
        print(f"written in {time.perf_counter() - began:.0f} s", flush=True)
        began = time.perf_counter()
        text = (
            ["--tokens", str(tokens), "--window-length", str(window_length)]
            if CRITERIA[method].statistics
            else []
        )
        peak = run_and_watch(
            [
                "prune",
                str(directory / "dense"),
                str(directory / "reduced"),
                "--method",
                method,
                "--keep",
                str(keep),
                *text,
            ]
        )
        print(f"{method}: {time.perf_counter() - began:.0f} s, peak resident memory {peak / 1e9:.2f} GB")
        if peak > memory:
            raise SystemExit(f"that is more than {memory / 1e9:.2f} GB")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    app()
