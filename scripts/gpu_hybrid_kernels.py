"""The kernels that hybrids need besides: softmax attention over pages, experts and products, each against float64."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_common import Run, error
from torch import Tensor, nn

from modeling.layers import AttentionMixer, MoE, RMSNorm
from modeling.runtime.gpu.attention import add_attention, add_attention_prefill
from modeling.runtime.gpu.moe import add_moe
from modeling.runtime.gpu.products import gated_product, product
from modeling.spec import AttentionSpec, MoESpec, RopeSpec, StateTypes
from modeling.state import PAGE_TOKENS, KVState, PagedKV
from modeling.state.pages import Pages, pages_for

EXACT = 2e-5
"""Largest relative difference from float64 where everything is float32."""
FACTOR = 1.3
"""In bfloat16 a kernel may be this much further from float64 than plain torch operations in bfloat16 are."""
SURE = {torch.float32: 1e-4, torch.bfloat16: 0.06}
"""How far the logits of the last expert chosen and of the next one must be apart for a token to count: rounding decides
about closer ones."""


@dataclass(frozen=True)
class Errors:
    """Relative distances from float64: of a kernel, and of plain torch operations on the same numbers."""

    ours: float
    plain: float

    def good(self, run: Run, dtype: torch.dtype) -> bool:
        """Whether it is near enough. Triton's interpreter truncates where a GPU rounds to the nearest."""
        most = EXACT if dtype == torch.float32 else (FACTOR if run.cuda else 4 * FACTOR) * self.plain
        return self.ours <= most  # false for NaN


def random_module(module: nn.Module, run: Run, dtype: torch.dtype) -> nn.Module:
    """The module with weights drawn on the device, norms in float32."""
    module = module.to_empty(device=run.device).requires_grad_(False)
    for name, p in module.named_parameters():
        if p.ndim == 1:  # a norm's
            p.normal_(1.0, 0.1)
        else:
            p.normal_(std=(2 if name == "router.weight" else 1) * p.shape[-1] ** -0.5)
            p.data = p.data.to(dtype)
    return module


def doubled(module: nn.Module, empty: nn.Module) -> nn.Module:
    """A copy in float64. Experts stay as they are, which they are widened from."""
    state = {name: p if p.ndim == 3 else p.double() for name, p in module.state_dict().items()}
    empty.load_state_dict(state, assign=True)
    return empty.requires_grad_(False)


def attention_specs(run: Run) -> Iterator[AttentionSpec]:
    """The attention of Qwen3.5-4B, 35B-A3B and OLMo-Hybrid, and one that is odd in everything."""

    def qwen(heads: int, kv_heads: int) -> AttentionSpec:
        width = 32 if run.small else 256
        return AttentionSpec(heads, kv_heads, width, RopeSpec(width // 4, 1e7), "head", True, 1e-6)

    if run.small:
        yield qwen(4, 2)
        yield AttentionSpec(3, 1, 20, None, "whole", False, 1e-6)
        return
    yield qwen(16, 4)
    yield qwen(16, 2)
    yield AttentionSpec(30, 30, 128, None, "whole", False, 1e-6)
    yield AttentionSpec(6, 2, 80, RopeSpec(80, 1e4), "none", True, 1e-6)


class PagedCase:
    """A mixer and a cache in which slots hold the keys and values of so many tokens, in pages in no order."""

    def __init__(self, run: Run, spec: AttentionSpec, dtype: torch.dtype, past: list[int], more: int) -> None:
        torch.manual_seed(spec.head_dim)
        hidden = 48 if run.small else 512
        self.mixer = random_module(_meta(AttentionMixer, spec, hidden, 0), run, dtype)
        self.exact = doubled(self.mixer, _meta(AttentionMixer, spec, hidden, 0))
        self.norm = random_module(_meta(RMSNorm, hidden, 1e-6), run, dtype)
        self.past, self.hidden, self.device, self.dtype = past, hidden, run.device, dtype
        rows = len(past) + 2
        count = sum(pages_for(n + more) for n in past) + 3
        pages = Pages(rows, count, max(past) + more, run.device)
        self.slots = torch.randperm(rows - 1, device=run.device)[: len(past)]
        for start in range(
            0, max(past) + more, PAGE_TOKENS
        ):  # each grows a page at a time, so that they interleave
            for slot, n in zip(self.slots.tolist(), past, strict=True):
                pages.grow(slot, min(n + more, start + PAGE_TOKENS))
        self.state = PagedKV.zeros(spec, pages, StateTypes(inputs=dtype), run.device)
        self.state.keys.normal_()
        self.state.values.normal_()
        for slot, n in zip(self.slots.tolist(), past, strict=True):
            pages.set_length(slot, n)

    def history(self, dtype: torch.dtype) -> KVState:
        """Keys and values so far."""
        kv = self.state.gather(self.slots)
        return KVState([t.to(dtype) for t in kv.keys], [t.to(dtype) for t in kv.values])

    def compare(self, offsets: list[int], *, decode: bool) -> tuple[Errors, float]:
        """Errors of the output; and of the keys and values that are in the pages then, relative to float64."""
        x = torch.randn(offsets[-1], self.hidden, device=self.device, dtype=self.dtype)
        plain, _ = self.mixer(self.norm(x), offsets, self.history(self.dtype))
        expected, after = self.exact(self.norm(x.double()), offsets, self.history(torch.float64))
        residual = torch.randn_like(x)
        arguments = (self.mixer, x, self.norm, None)
        if decode:
            made = add_attention(*arguments, self.state, self.slots)
            again = add_attention(self.mixer, x, self.norm, residual.clone(), self.state, self.slots)
        else:
            steps = (offsets, self.state, self.slots, None)
            made = add_attention_prefill(*arguments, *steps)
            again = add_attention_prefill(self.mixer, x, self.norm, residual.clone(), *steps)
        self.state.pages.advance(self.slots, None if decode else offsets)
        kept = self.state.gather(self.slots)
        pairs = [(kept.keys, after.keys), (kept.values, after.values)]
        distance = max(error(torch.cat(ours), torch.cat(exact)) for ours, exact in pairs)
        errors = Errors(error(made, expected), error(plain, expected))
        added = error(again, residual.double() + expected)
        return errors if added <= max(EXACT, 2 * errors.plain) else Errors(added, errors.plain), distance


def _meta(kind: type, *arguments: object) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = kind(*arguments)
    return module


@torch.inference_mode()
def check_attention(run: Run) -> Iterator[list[str]]:
    """Packed prompts with and without a history, long ones among them, then decode steps on what they left."""
    past = [0, 70, 3] if run.small else [0, 1, 63, 64, 200, 8191, 0]
    lengths = [5, 1, 66] if run.small else [77, 1, 65, 300, 64, 130, 1100]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    worst: dict[str, float] = {}
    for spec in attention_specs(run):
        for dtype in (torch.float32, torch.bfloat16):
            run.need(3)
            name = f"attention {spec.num_heads}/{spec.num_kv_heads} x {spec.head_dim} {str(dtype)[6:]}"
            case = PagedCase(run, spec, dtype, past, max(lengths) + 8)
            found = {"prompts": case.compare(offsets, decode=False)}
            for step in range(2):
                found[f"step {step}"] = case.compare(list(range(len(past) + 1)), decode=True)
            yield from _judged(run, name, dtype, found, worst)
    yield ["attention, all shapes", "", ", ".join(f"{k} {v:.1e}" for k, v in worst.items())]


def _judged(
    run: Run,
    name: str,
    dtype: torch.dtype,
    found: dict[str, tuple[Errors, float]],
    worst: dict[str, float],
) -> Iterator[list[str]]:
    """A row for each case; `worst` gets the largest errors by dtype."""
    cache_limit = EXACT if dtype == torch.float32 else 1e-2
    key = str(dtype)[6:]
    for what, (errors, cache) in found.items():
        run.report.setdefault("hybrid_kernels", {})[f"{name} {what}"] = vars(errors) | {"cache": cache}
        good = errors.good(run, dtype) and cache <= cache_limit
        worst[key] = max(worst.get(key, 0.0), errors.ours)
        told = f"{errors.ours:.1e} (plain torch {errors.plain:.1e}), cache {cache:.1e}"
        yield [f"{name} {what}", run.check(good, f"{name} {what}"), told]


def expert_specs(run: Run) -> Iterator[tuple[MoESpec, int]]:
    """Experts and hidden size: those of 35B-A3B, and one odd in everything."""
    if run.small:
        yield MoESpec(5, 2, 24, 16), 40
        return
    yield MoESpec(256, 8, 512, 512), 2048
    yield MoESpec(37, 3, 96, 80), 320


@torch.inference_mode()
def check_experts(run: Run) -> Iterator[list[str]]:
    """Experts, with as many tokens as decode steps and prompts have."""
    for spec, hidden in expert_specs(run):
        for dtype in (torch.float32, torch.bfloat16):
            run.need(4)
            torch.manual_seed(0)
            moe = random_module(_meta(MoE, spec, hidden), run, dtype)
            exact = doubled(moe, _meta(MoE, spec, hidden))
            norm = random_module(_meta(RMSNorm, hidden, 1e-6), run, dtype)
            for tokens in (1, 7) if run.small else (1, 2, 33, 128, 1000):
                x = torch.randn(tokens, hidden, device=run.device, dtype=dtype)
                y = norm(x)
                top = exact.router(y.double()).topk(spec.top_k + 1, dim=-1).values
                sure = top[:, -2] - top[:, -1] > SURE[dtype]
                expected = exact(norm(x.double()))
                made, plain = add_moe(moe, x, norm, None), moe(y)
                added = add_moe(moe, x, norm, x.clone()) - x
                errors = Errors(*(_distance(t, expected, sure) for t in (made, plain)))
                summed = _distance(added, expected, sure)
                good = errors.good(run, dtype) and summed <= max(10 * EXACT, 3 * errors.plain)
                name = f"experts {spec.num_experts} x {spec.expert_size} {str(dtype)[6:]}, {tokens} tokens"
                run.report.setdefault("hybrid_kernels", {})[name] = vars(errors)
                told = f"{errors.ours:.1e} (plain torch {errors.plain:.1e}), {int(sure.sum())} sure of their experts"
                yield [name, run.check(good, name), told]


def _distance(made: Tensor, expected: Tensor, rows: Tensor) -> float:
    """Relative error of some rows; 0 if there are none."""
    return error(made[rows], expected[rows]) if bool(rows.any()) else 0.0


def product_shapes(run: Run) -> list[tuple[int, int]]:
    """Outputs and inputs: of Qwen3.5-4B a linear layer's, an attention layer's and the feed-forward's, and odd ones."""
    if run.small:
        return [(40, 24), (24, 40)]
    return [(12352, 2560), (10240, 2560), (2560, 4096), (2560, 9216), (1000, 328), (17, 40)]


@torch.inference_mode()
def check_products(run: Run) -> Iterator[list[str]]:
    """Few rows and many, with and without norm and residual."""
    for dtype in (torch.float32, torch.bfloat16):
        worst = Errors(0.0, 0.0)
        for outputs, inputs in product_shapes(run):
            run.need(1)
            torch.manual_seed(outputs)
            weight = (torch.randn(outputs, inputs, device=run.device) * inputs**-0.5).to(dtype)
            norm = random_module(_meta(RMSNorm, inputs, 1e-6), run, dtype)
            for rows in (1, 5) if run.small else (1, 2, 3, 8, 17, 32, 64, 100, 128, 256, 512):
                x = torch.randn(rows, inputs, device=run.device, dtype=dtype)
                residual = torch.randn(rows, outputs, device=run.device, dtype=dtype)
                for case, ours, plain, expected in _products(x, weight, norm, residual):
                    errors = Errors(error(ours, expected), error(plain, expected))
                    name = f"product {rows} x {inputs} -> {outputs} {str(dtype)[6:]} {case}"
                    run.report.setdefault("hybrid_kernels", {})[name] = vars(errors)
                    if not errors.good(run, dtype):
                        told = f"{errors.ours:.1e} (plain torch {errors.plain:.1e})"
                        yield [name, run.check(False, name), told]
                    worst = max(worst, errors, key=lambda e: e.ours)
        yield [
            f"products, all shapes, {str(dtype)[6:]}",
            "",
            f"worst {worst.ours:.1e}, torch {worst.plain:.1e}",
        ]


def _products(
    x: Tensor, weight: Tensor, norm: nn.Module, residual: Tensor
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, ours, plain torch's, and float64."""
    wide, normed = weight.double().t(), norm(x)
    yield "alone", product(x, weight), x @ weight.t(), x.double() @ wide
    exact = norm(x.double()) @ wide
    yield "normed", product(x, weight, norm), normed @ weight.t(), exact
    plain = residual + normed @ weight.t()
    yield "added", product(x, weight, norm, residual.clone()), plain, residual.double() + exact
    if len(weight) % 2 == 0:
        gate, up = exact.chunk(2, dim=-1)
        narrow = (normed @ weight.t()).chunk(2, dim=-1)
        plain = nn.functional.silu(narrow[0]) * narrow[1]
        yield "gated", gated_product(x, weight, norm), plain, nn.functional.silu(gate) * up
