"""Decode and prefill speed of hybrid models on a CPU against llama.cpp, with the same random weights.

    pip install --no-binary llama-cpp-python llama-cpp-python
    pip download --no-binary :all: --no-deps llama-cpp-python   # its vendor/llama.cpp is what --source wants
    python benchmarks/llama.py 0.8B --source llama_cpp_python-0.3.36/vendor/llama.cpp --json llama.json

llama.cpp's own converter makes the GGUF of the checkpoint that we load (only the tokenizer's pre-tokenizer is told it,
since the tokenizer is a stand-in). llama.cpp runs through llama-cpp-python's bindings, in a process of its own
(llama_worker.py). All sides take turns: a few tokens of each request a turn, random ones, after a prompt of `--context`
tokens of which each request has states, keys and values of its own. Logits are compared on the same tokens first. The
reduced model (d_k 64) runs beside them; llama.cpp has no model whose d_k is not d_v, so that it can't load that.

With --batched-bench, its own llama-batched-bench runs the same cases too, once: a check of how we drive it.
"""

import json as json_module
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from measure import difference, machine, quiet, ratios, spread, summary, turns
from outputs import FiguresFile, write_figures

# isort: split

import numpy as np
import torch
import typer
from hybrid_models import SHAPES, Kept, kept_in, random_checkpoint
from hybrids import MANY, ROOM, STEPS, Ours, prefill_ours
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modeling.checkpoint import open_checkpoint
from modeling.runtime import Runtime, compile_model
from modeling.state import SequenceState

DENSE, REDUCED = "ours dense", "ours reduced"
MOST_OF_BENCH = 1024
"""Prompt tokens of a case that llama-batched-bench runs too: unlike us, it feeds the prompt of each request."""
TOLERANCE = 0.1
"""Largest difference of logits, relative in norm: each rounds activations to 16 bits in places of its own."""
CONVERT = """
import sys
source, model, out, outtype = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
import convert_hf_to_gguf
sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", outtype, "--no-mtp"]
convert_hf_to_gguf.main()
"""
BENCH_TRIES = 6
"""llama-batched-bench may end before what it says has been written."""


class LlamaCpp:
    """llama.cpp with a model and room for some sequences, in a process of its own, until `close`."""

    def __init__(self, model: Path, threads: int, sequences: int, tokens: int) -> None:
        settings = {"model": str(model), "threads": threads, "sequences": sequences, "tokens": tokens}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("llama_worker.py"), json_module.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def __call__(self, do: str, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json_module.dumps({"do": do, **command}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def logits(self, do: str, **command: Any) -> Tensor:
        """Calls, and gives the logits of the last prompt's last token, `[1, vocab]`, or those of all sequences."""
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/logits.npy"
            self(do, **command, logits=file)
            return torch.from_numpy(np.load(file))

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"llama.cpp ended with code {self._process.wait()}")
        answer: dict[str, Any] = json_module.loads(line)
        return answer


@contextmanager
def all_running(
    ggufs: dict[str, Path], threads: int, sequences: int, tokens: int
) -> Iterator[dict[str, LlamaCpp]]:
    llamas = {name: LlamaCpp(gguf, threads, sequences, tokens) for name, gguf in ggufs.items()}
    try:
        yield llamas
    finally:
        for llama in llamas.values():
            llama.close()


def convert(source: Path, checkpoint: Path, outtype: str) -> Path:
    """The checkpoint as a GGUF in its folder, converted unless it is there already."""
    out = checkpoint / f"{outtype}.gguf"
    if out.exists():
        return out
    command = [sys.executable, "-c", CONVERT, source, checkpoint, out, outtype]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp's converter failed:\n{done.stderr[-3000:]}")
    return out


Sides = dict[str, Callable[[], float]]
"""What a turn of each side takes, in seconds for each step or for all prompts."""


def decode_sides(
    runtimes: dict[str, Runtime],
    states: dict[str, list[SequenceState]],
    llamas: dict[str, LlamaCpp],
    batch: int,
    length: int,
) -> tuple[Sides, dict[str, float]]:
    """A few steps of `batch` requests behind the `length` tokens whose states are given, and that `llamas` have kept;
    and by how much each GGUF's logits differ from ours."""
    vocab = runtimes[DENSE].model.spec.vocab_size
    steps = STEPS if batch < MANY else 1
    ids = torch.randint(1, vocab, (batch,))
    sides: Sides = {}
    for name, runtime in runtimes.items():
        ours = Ours(runtime, states[name], length, ids)
        sides[name] = partial(ours_turn, ours, steps, vocab)
        if name == DENSE:
            expected = ours()
    differences = {}
    for name, llama in llamas.items():
        llama("copy", sequences=batch)
        found = llama.logits("decode", ids=[ids.tolist()])
        differences[name] = difference(expected, found, TOLERANCE, f"{name} at batch {batch}")
        sides[name] = partial(llama_turn, llama, steps, batch, vocab)
    return sides, differences


def ours_turn(ours: Ours, steps: int, vocab: int) -> float:
    ids = torch.randint(1, vocab, (steps, len(ours.ids)))
    began = clock()
    for row in ids:
        ours.ids = row
        ours()
    return (clock() - began) / steps


def llama_turn(llama: LlamaCpp, steps: int, batch: int, vocab: int) -> float:
    ids = torch.randint(1, vocab, (steps, batch))
    seconds: float = llama("decode", ids=ids.tolist())["seconds"]
    return seconds / steps


def prefill_sides(
    runtimes: dict[str, Runtime], llamas: dict[str, LlamaCpp], batch: int, length: int
) -> tuple[Sides, dict[str, float]]:
    """The same as `decode_sides`, but that a turn is `batch` prompts of `length` tokens."""
    prompts = torch.randint(1, runtimes[DENSE].model.spec.vocab_size, (batch, length))
    expected = prefill_ours(runtimes[DENSE], prompts)[0]
    sides: Sides = {name: partial(prefill_turn, runtime, prompts) for name, runtime in runtimes.items()}
    differences = {}
    for name, llama in llamas.items():
        found = llama.logits("prefill", prompts=prompts.tolist())
        differences[name] = difference(expected[-1:], found, TOLERANCE, name)
        sides[name] = lambda llama=llama: llama("prefill", prompts=prompts.tolist())["seconds"]
    return sides, differences


def prefill_turn(runtime: Runtime, prompts: Tensor) -> float:
    began = clock()
    prefill_ours(runtime, prompts)
    return clock() - began


def clock() -> float:
    """The CPU's time on one thread, the wall's on several, as the worker's."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def batched_bench(
    program: Path, gguf: Path, threads: int, batch: int, length: int
) -> dict[str, float] | None:
    """What llama-batched-bench says of a case: tokens/s of prefill and of decoding. None if it says nothing."""
    tokens = 16
    options = {"-npp": length, "-ntg": tokens, "-npl": batch, "-t": threads, "-tb": threads}
    options |= {"-c": batch * (length + tokens + 255) // 256 * 256, "--output-format": "jsonl"}
    command = [program, "-m", gguf, *(part for option in options.items() for part in option)]
    for _ in range(BENCH_TRIES):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("{")]
        if done.returncode:
            raise SystemExit(f"{program} failed:\n{done.stderr[-3000:]}")
        if lines:
            figures = json_module.loads(lines[0])
            return {"prefill": figures["speed_pp"], "decode": figures["speed_tg"]}
    return None


@torch.inference_mode()
def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    source: Annotated[Path, typer.Option(help="Sources of llama.cpp, for its converter.")],
    batch: Annotated[list[int], typer.Option(help="May be given several times.")] = [1, 8, 32],  # noqa: B006
    context: Annotated[list[int], typer.Option(help="Tokens before the first decoded.")] = [128, 2048],  # noqa: B006
    prefill: Annotated[list[str], typer.Option(help="Prompts, as in 8x128.")] = ["1x128", "8x128", "1x2048"],  # noqa: B006
    outtype: Annotated[list[str], typer.Option(help="Dtype of the GGUF: bf16 or f16.")] = ["bf16", "f16"],  # noqa: B006
    reduced: Annotated[int, typer.Option(help="Key channels of the reduced model.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = 1,
    seconds: Annotated[float, typer.Option(help="Seconds of a case, about; five rounds at least.")] = 15,
    bench: Annotated[Path | None, typer.Option("--batched-bench", help="llama-batched-bench.")] = None,
    models: Kept = None,
    json: FiguresFile = None,
) -> None:
    quiet(threads)
    console = Console(width=150)
    rows: list[dict[str, Any]] = []
    with kept_in(models) as folder:
        checkpoints = {
            DENSE: random_checkpoint(folder, shape),
            REDUCED: random_checkpoint(folder, shape, reduced),
        }
        ggufs = {f"llama.cpp {t}": convert(source, checkpoints[DENSE], t) for t in outtype}
        runtimes = {
            name: compile_model(open_checkpoint(str(path)).load(dtype=torch.bfloat16).requires_grad_(False))
            for name, path in checkpoints.items()
        }

        def done(phase: str, size: int, length: int, sides: Sides, differences: dict[str, float]) -> None:
            for side in sides.values():  # warm up
                side()
            times = turns(sides, seconds)
            tokens = size * (length if phase == "prefill" else 1)
            row = {
                "shape": shape,
                "phase": phase,
                "batch": size,
                "tokens": length,
                "threads": threads,
                "tokens_per_second": {name: summary([tokens / t for t in times[name]]) for name in times},
                "speedup": {
                    f"{name} over {gguf}": ratios(times[gguf], times[name])
                    for name in runtimes
                    for gguf in ggufs
                },
                "logits_difference": differences,
            }
            if bench is not None and phase == "decode" and size * length <= MOST_OF_BENCH:
                row["batched_bench"] = {
                    name: batched_bench(bench, gguf, threads, size, length) for name, gguf in ggufs.items()
                }
            rows.append(row)
            said = ", ".join(f"{name} {spread(s)}" for name, s in row["speedup"].items())
            console.print(f"{phase}, {size} x {length}: {said}", highlight=False)
            write_figures(json, {"machine": machine(), "llama_cpp": llama_cpp_version(), "cases": rows})

        for prompts in prefill:
            size, length = map(int, prompts.split("x"))
            with all_running(ggufs, threads, size, length) as llamas:
                done("prefill", size, length, *prefill_sides(runtimes, llamas, size, length))
        for length in context:
            with all_running(ggufs, threads, max(batch), length + ROOM) as llamas:
                prompt = torch.randint(1, runtimes[DENSE].model.spec.vocab_size, (1, length))
                states = {
                    name: prefill_ours(runtime, prompt)[1].gather(torch.arange(1))
                    for name, runtime in runtimes.items()
                }
                for llama in llamas.values():
                    llama("keep", prompt=prompt[0].tolist())
                for size in batch:
                    done("decode", size, length, *decode_sides(runtimes, states, llamas, size, length))
    console.print(table_of(rows, f"{shape}, {threads} thread{'s' * (threads > 1)}"))


def llama_cpp_version() -> str:
    """The version of llama-cpp-python, which says that of llama.cpp."""
    found = subprocess.run(
        [sys.executable, "-c", "import llama_cpp; print(llama_cpp.__version__)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return f"llama-cpp-python {found.stdout.strip()}"


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    sides = list(rows[0]["tokens_per_second"])
    pairs = list(rows[0]["speedup"])
    table = Table("phase", "batch", "tokens", *(f"{side}\ntokens/s" for side in sides), *pairs, title=title)
    for r in rows:
        table.add_row(
            *(r["phase"], str(r["batch"]), str(r["tokens"])),
            *(f"{r['tokens_per_second'][side]['median']:.4g}" for side in sides),
            *(spread(r["speedup"][pair]) for pair in pairs),
        )
    return table


if __name__ == "__main__":
    typer.run(main)
