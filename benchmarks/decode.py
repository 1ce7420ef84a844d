"""Decode speed on a CPU against transformers, the products alone, and the bytes that a step must move.

    python benchmarks/decode.py demo/model --json decode.json
    python benchmarks/decode.py random-171M --batch 1 --batch 8 --batch 32
    python benchmarks/decode.py random-171M --dtype bfloat16
    python benchmarks/decode.py random-171M --state-dtype float32 --state-dtype int8

Each case decodes greedily after a short random prompt, four tokens a round on each side in turns, one thread. All
sides hold the same weights (peer.py), and the first steps are compared. Given several state dtypes, each is a side of
its own in the same rounds, and its speed is also given over that of the first. A step must read the weights once and
read and write B states; the share of the bound is the time that takes at the memory bandwidth read in the same rounds,
over the step's. Caches may hold a small model's weights, and then the share may pass 100 %. "Products" are the model's
matrix products alone, by torch and by our kernel.
"""

from typing import Annotated, Any

from measure import (
    copy_memory,
    difference,
    interleave,
    load,
    machine,
    products,
    quiet,
    ratios,
    read_memory,
    spread,
    summary,
)
from outputs import FiguresFile, write_figures
from peer import LinearOnlyCache, peer_of

# isort: split

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from modeling.runtime.cpu import CpuRuntime
from modeling.spec import STATE_DTYPES, StateDType, StateTypes
from modeling.state import StatePool

PROMPT, COMPARED, STEPS = 16, 4, 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference of logits, relative in norm. In bfloat16 the peer rounds all activations, we those of products."""
STATE_TOLERANCE: dict[StateDType, float] = {"float32": 0.0, "bfloat16": 0.05, "int8": 0.1}
"""What a state that is rounded after every token adds to it: the peer's is in float32."""


class Ours:
    def __init__(self, runtime: CpuRuntime, prompts: Tensor, state_dtype: StateDType) -> None:
        batch, length = prompts.shape
        model = runtime.model
        self.runtime = runtime
        types = StateTypes.named(state_dtype, model.embeddings.weight.dtype)
        self.pool = StatePool(model.spec, batch, types=types)
        self.slots = torch.randperm(batch)
        offsets = [i * length for i in range(batch + 1)]
        hidden = runtime.prefill(prompts.flatten(), offsets, self.pool, self.slots)
        self.ids = runtime.logits(hidden[length - 1 :: length]).argmax(-1)

    def __call__(self) -> Tensor:
        logits = self.runtime.logits(self.runtime.decode(self.ids, self.pool, self.slots))
        self.ids = logits.argmax(-1)
        return logits


class Theirs:
    def __init__(self, peer: Any, prompts: Tensor) -> None:
        self.peer, self.cache = peer, LinearOnlyCache(peer.config)
        logits = peer(prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        self.ids = logits.argmax(-1)

    def __call__(self) -> Tensor:
        logits: Tensor = self.peer(self.ids[:, None], past_key_values=self.cache, use_cache=True).logits[
            :, -1
        ]
        self.ids = logits.argmax(-1)
        return logits


def compare(ours: Ours, theirs: Theirs, tolerance: float) -> float:
    """The largest difference over some steps on the same tokens."""
    worst = 0.0
    for _ in range(COMPARED):
        theirs.ids = ours.ids
        worst = max(worst, difference(ours(), theirs(), tolerance))
    return worst


def measure(
    runtime: CpuRuntime, peer: Any, batch: int, state_dtypes: list[StateDType], seconds: float
) -> list[dict[str, Any]]:
    """The figures of each state dtype, all of the same rounds."""
    model = runtime.model
    tolerance = TOLERANCE[model.embeddings.weight.dtype]
    prompts = torch.randint(1, model.spec.vocab_size, (batch, PROMPT))
    sides = {name: Ours(runtime, prompts, name) for name in state_dtypes}
    differences = {
        name: compare(side, Theirs(peer, prompts), tolerance + STATE_TOLERANCE[name])
        for name, side in sides.items()
    }
    times = interleave(
        {
            "transformers": Theirs(peer, prompts),
            **sides,
            "products_torch": products(model, batch, F.linear),
            "products_ours": products(model, batch, runtime.linear),
            "read": read_memory(),
            "copy": copy_memory(),
        },
        seconds,
        calls=STEPS,
    )
    return [
        {
            "batch": batch,
            "backend": runtime.name,
            "state_dtype": name,
            "logits_difference": differences[name],
            "speed_over_first_state_dtype": ratios(times[state_dtypes[0]], times[name]),
            **figures(model, side, {**times, "ours": times[name]}),
        }
        for name, side in sides.items()
    ]


def figures(model: nn.Module, ours: Ours, times: dict[str, list[float]]) -> dict[str, Any]:
    """What the times of our side, and of what ran beside it, come to."""
    batch = len(ours.ids)
    weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    states = batch * ours.pool.bytes_per_slot
    read = [(1 << 28) / t for t in times["read"]]
    step_bytes = weights + 2 * states
    sides = ("transformers", "ours", "products_torch", "products_ours", "read", "copy")
    return {
        "weights_bytes": weights,
        "state_bytes": states,
        "seconds": {name: summary(times[name]) for name in sides},
        "tokens_per_second": {
            name: summary([batch / t for t in times[name]]) for name in ("ours", "transformers")
        },
        "speedup": ratios(times["transformers"], times["ours"]),
        "share_of_torch_products": ratios(times["products_torch"], times["ours"]),
        "share_of_our_products": ratios(times["products_ours"], times["ours"]),
        "bytes_per_second": summary([step_bytes / t for t in times["ours"]]),
        "read_bytes_per_second": summary(read),
        "copy_bytes_per_second": summary([(1 << 28) / t for t in times["copy"]]),
        "share_of_byte_bound": summary(
            [step_bytes / t / r for t, r in zip(times["ours"], read, strict=True)]
        ),
    }


def state_dtype_of(name: str) -> str:
    if name not in STATE_DTYPES:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(STATE_DTYPES)}")
    return name


@torch.inference_mode()
def main(
    source: Annotated[str, typer.Argument(help='Checkpoint, or "random-171M".')],
    d_k: Annotated[list[int], typer.Option(help="Widths; weights are random where not of that width.")] = [],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="May be given several times.")] = [1, 8, 32, 128],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of both sides' weights.")] = "float32",
    state_dtype: Annotated[
        list[str],
        typer.Option(
            parser=state_dtype_of,
            metavar="|".join(STATE_DTYPES),
            help="Dtype of our states; may be given several times.",
        ),
    ] = ["float32"],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="Per batch size, about.")] = 15,
    json: FiguresFile = None,
) -> None:
    quiet()
    console = Console()
    rows: list[dict[str, Any]] = []
    table = Table(
        *("d_k", "batch", "states", "transformers\ntokens/s", "ours\ntokens/s", "speed-up\n(quartiles)"),
        f"over states\nin {state_dtype[0]}",
        *("share of products\ntorch's / ours", "GB/s", "memory reads\nGB/s", "share of\nbyte bound"),
        title=f"{source}, {dtype}, one thread",
    )
    for width in d_k or [None]:
        model = load(source, width, getattr(torch, dtype))
        runtime = CpuRuntime(model)
        peer = peer_of(model)
        for size in batch:
            console.print(f"d_k {model.spec.mean_d_k:g}, batch {size}", highlight=False)
            for r in measure(runtime, peer, size, state_dtype, seconds):
                rows.append({"source": source, "dtype": dtype, "d_k": model.spec.d_k[0], **r})
                table.add_row(
                    f"{model.spec.d_k[0]}",
                    f"{size}",
                    r["state_dtype"],
                    *(f"{r['tokens_per_second'][side]['median']:.0f}" for side in ("transformers", "ours")),
                    spread(r["speedup"]),
                    spread(r["speed_over_first_state_dtype"]),
                    f"{r['share_of_torch_products']['median']:.0%} / {r['share_of_our_products']['median']:.0%}",
                    f"{r['bytes_per_second']['median'] / 1e9:.1f}",
                    f"{r['read_bytes_per_second']['median'] / 1e9:.1f}",
                    f"{r['share_of_byte_bound']['median']:.0%}",
                )
    console.print(table)
    write_figures(json, {"machine": machine(), "cases": rows})


if __name__ == "__main__":
    typer.run(main)
