"""Prefill speed on a CPU against transformers' chunked path.

    python benchmarks/prefill.py demo/model --json prefill.json

One prompt of 1,024 tokens and eight of 512, each as one forward from empty states to the last token's logits and the
states, in turns, one thread, the same weights on both sides (peer.py). We pack prompts; the peer takes them as a batch,
with no padding as they are of one length. "Rule" is the gated delta rule of one layer alone, theirs over ours;
"products" are the layers' matrix products alone, as torch does them on both sides.
"""

from collections.abc import Callable
from typing import Annotated, Any

from measure import difference, interleave, load, machine, products, quiet, ratios, spread, summary
from outputs import FiguresFile, write_figures
from peer import LinearOnlyCache, peer_of

# isort: split

import torch
import torch.nn.functional as F
import typer
from decode import TOLERANCE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from modeling.layers import l2_normalise
from modeling.model import Model
from modeling.ops import RuleInputs
from modeling.runtime.cpu import CpuRuntime, compiled_gated_delta_rule
from modeling.spec import StateTypes
from modeling.state import StatePool

CASES = ((1, 1024), (8, 512))


def rules(model: Model, batch: int, length: int) -> dict[str, Callable[[], Tensor]]:
    """The gated delta rule of the first linear layer on random inputs, by us and by transformers."""
    m = next(iter(model.spec.deltas.values()))
    shape = (batch * length, m.num_k_heads, m.d_k)
    q, k = l2_normalise(torch.randn(shape)), l2_normalise(torch.randn(shape))
    v, b = torch.randn(batch * length, m.num_v_heads, m.d_v), torch.rand(batch * length, m.num_v_heads)
    g = -torch.rand(batch * length, m.num_v_heads)
    rows = [x.unflatten(0, (batch, length)) for x in (q, k, v)]
    cu_seqlens = [i * length for i in range(batch + 1)]

    def ours() -> Tensor:
        return compiled_gated_delta_rule(RuleInputs(q, k, v, g, b, m.d_k**-0.5, cu_seqlens))[0]

    def theirs() -> Tensor:
        o: Tensor = torch_chunk_gated_delta_rule(
            *rows,
            g=g.unflatten(0, (batch, length)),
            beta=b.unflatten(0, (batch, length)),
            output_final_state=True,
        )[0]
        return o

    torch.testing.assert_close(ours(), theirs().flatten(0, 1), rtol=1e-3, atol=1e-4)
    return {"rule_ours": ours, "rule_transformers": theirs}


def measure(runtime: CpuRuntime, peer: Any, batch: int, length: int, seconds: float) -> dict[str, Any]:
    model = runtime.model
    prompts = torch.randint(1, model.spec.vocab_size, (batch, length))
    cu_seqlens = [i * length for i in range(batch + 1)]

    types = StateTypes(inputs=model.embeddings.weight.dtype)
    slots = torch.arange(batch)

    def ours() -> Tensor:
        # A fresh pool each time, as transformers has a fresh cache.
        hidden = runtime.prefill(
            prompts.flatten(), cu_seqlens, StatePool(model.spec, batch, types=types), slots
        )
        return runtime.logits(hidden[length - 1 :: length])

    def theirs() -> Tensor:
        cache = LinearOnlyCache(peer.config)
        logits: Tensor = peer(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits

    distance = difference(ours(), theirs(), TOLERANCE[model.embeddings.weight.dtype])
    sides = {
        "transformers": theirs,
        "ours": ours,
        "products": products(model.layers, batch * length, F.linear),
    }
    times = interleave({**sides, **rules(model, batch, length)}, seconds)
    return {
        "batch": batch,
        "length": length,
        "backend": runtime.name,
        "logits_difference": distance,
        "seconds": {name: summary(t) for name, t in times.items()},
        "tokens_per_second": {
            name: summary([batch * length / t for t in times[name]]) for name in ("ours", "transformers")
        },
        "speedup": ratios(times["transformers"], times["ours"]),
        "rule_speedup": ratios(times["rule_transformers"], times["rule_ours"]),
        "share_of_products": ratios(times["products"], times["ours"]),
    }


@torch.inference_mode()
def main(
    source: Annotated[str, typer.Argument(help='Checkpoint, or "random-171M".')],
    d_k: Annotated[list[int], typer.Option(help="Widths; weights are random where not of that width.")] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of both sides' weights.")] = "float32",
    seconds: Annotated[float, typer.Option(help="Per case, about.")] = 20,
    json: FiguresFile = None,
) -> None:
    quiet()
    console = Console()
    rows: list[dict[str, Any]] = []
    table = Table(
        *(
            "d_k",
            "prompts",
            "transformers\ntokens/s",
            "ours\ntokens/s",
            "speed-up\n(quartiles)",
            "rule alone\n(quartiles)",
            "products\nshare",
        ),
        title=f"{source}, {dtype}, one thread",
    )
    for width in d_k or [None]:
        model = load(source, width, getattr(torch, dtype))
        runtime = CpuRuntime(model)
        peer = peer_of(model)
        for batch, length in CASES:
            console.print(f"d_k {model.spec.mean_d_k:g}, {batch} x {length}", highlight=False)
            r = measure(runtime, peer, batch, length, seconds)
            rows.append({"source": source, "dtype": dtype, "d_k": model.spec.d_k[0], **r})
            table.add_row(
                f"{model.spec.d_k[0]}",
                f"{batch} x {length}",
                *(f"{r['tokens_per_second'][side]['median']:.0f}" for side in ("transformers", "ours")),
                spread(r["speedup"]),
                spread(r["rule_speedup"]),
                f"{r['share_of_products']['median']:.0%}",
            )
    console.print(table)
    write_figures(json, {"machine": machine(), "cases": rows})


if __name__ == "__main__":
    typer.run(main)
