"""Softmax attention over pages by the definition, in float64, and pages to check kernels with."""

import math

import torch

from modeling.layers import AttentionMixer
from modeling.runtime.gpu.attention import attention_step
from modeling.spec import AttentionSpec, RopeSpec, StateTypes
from modeling.state import PAGE_TOKENS, PagedKV, Pages

SPECS = {
    "qwen": AttentionSpec(8, 2, 32, RopeSpec(8, 1e7), "head", True, 1e-6),
    "olmo": AttentionSpec(3, 3, 16, None, "whole", False, 1e-6),
    "all-rotated": AttentionSpec(4, 4, 16, RopeSpec(16, 100.0), "whole", True, 1e-5),
    "six-to-one": AttentionSpec(12, 2, 16, RopeSpec(4, 1e4), "none", False, 1e-5),
    "eight-to-one": AttentionSpec(8, 1, 48, RopeSpec(12, 1e4), "head", False, 1e-5),
    "sixteen-to-one": AttentionSpec(16, 1, 16, None, "none", True, 1e-5),
    "three-to-one-wide": AttentionSpec(3, 1, 72, RopeSpec(70, 1e4), "head", True, 1e-5),
    "narrow": AttentionSpec(6, 2, 6, RopeSpec(2, 1e4), "whole", True, 1e-5),
    "widest": AttentionSpec(2, 1, 256, RopeSpec(64, 1e7), "head", True, 1e-6),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
"""Arithmetic is in float32, and what is stored is rounded once: the interpreter cuts bfloat16 off, a GPU rounds it."""
HIDDEN = 24
SLOTS = 6


def make_mixer(name: str, dtype: torch.dtype = torch.float32) -> AttentionMixer:
    mixer = AttentionMixer(SPECS[name], HIDDEN, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter, p in mixer.named_parameters():
            p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 + (1 if "norm" in parameter else 0))
    return mixer.to(dtype).requires_grad_(False)


class Paged:
    """Pages of one layer, in which the slots have random keys and values of the given lengths, and NaN behind them."""

    def __init__(
        self, spec: AttentionSpec, lengths: dict[int, int], dtype: torch.dtype, room: int = 0, width: int = 5
    ):
        self.spec = spec
        self.pages = Pages(SLOTS + 1, SLOTS * width, width * PAGE_TOKENS, "cpu")
        self.state = PagedKV.zeros(spec, self.pages, StateTypes(inputs=dtype), "cpu")
        torch.manual_seed(3)
        for t in (self.state.keys, self.state.values):
            t.fill_(torch.nan)
        # Not one after the other, and not in the order of the slots.
        for tokens in range(1, width * PAGE_TOKENS + 1, PAGE_TOKENS):
            for slot in sorted(lengths, reverse=True):
                if tokens <= lengths[slot] + room:
                    assert self.pages.grow(slot, tokens)
        for slot, length in lengths.items():
            self.pages.set_length(slot, length)
            for t in (self.state.keys, self.state.values):
                for position in range(length):
                    self.at(t, slot, position)[:] = torch.randn(spec.num_kv_heads, spec.head_dim)

    def at(self, t: torch.Tensor, slot: int, position: int) -> torch.Tensor:
        """A token's `[num_kv_heads, head_dim]`."""
        return t[self.pages.of(slot)[position // PAGE_TOKENS], :, position % PAGE_TOKENS]

    def history(self, slot: int) -> list[torch.Tensor]:
        """Keys and values of what the slot has seen, float64 `[tokens, num_kv_heads, head_dim]`."""
        length = int(self.pages.lengths[slot])
        shape = (0, self.spec.num_kv_heads, self.spec.head_dim)
        return [
            torch.stack([self.at(t, slot, i) for i in range(length)]).double()
            if length
            else torch.empty(shape)
            for t in (self.state.keys, self.state.values)
        ]

    def bits(self) -> list[torch.Tensor]:
        """Copies of all pages but the null page, to be compared bit by bit, NaN or not."""
        whole = {4: torch.int32, 2: torch.int16}[self.state.keys.element_size()]
        return [t[:-1].view(whole).clone() for t in (self.state.keys, self.state.values)]


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def turned(x: torch.Tensor, position: int, rope: RopeSpec | None) -> torch.Tensor:
    """Heads `[heads, head_dim]` with their pairs of channels turned as complex numbers."""
    if rope is None:
        return x
    half = rope.dims // 2
    # Its frequencies are those of the model: in float32, as they are published.
    frequencies = (rope.theta ** -(torch.arange(half, dtype=torch.float32) / half)).double()
    pairs = torch.complex(x[:, :half], x[:, half : rope.dims]) * torch.polar(
        torch.ones(half, dtype=torch.float64), position * frequencies
    )
    return torch.cat([pairs.real, pairs.imag, x[:, rope.dims :]], dim=1)


def by_definition(mixer: AttentionMixer, row: torch.Tensor, keys: torch.Tensor, values: torch.Tensor):
    """One token's projection `[sum(in_proj_sizes)]` after the keys and values before it: what the output projection
    takes, and keys and values with the new ones."""
    s = mixer.spec
    q, k, v, gate = row.double().split(s.in_proj_sizes)
    if s.qk_norm == "whole":
        q, k = rms(q, mixer.q_norm.weight, s.norm_eps), rms(k, mixer.k_norm.weight, s.norm_eps)
    q, k, v = (t.view(-1, s.head_dim) for t in (q, k, v))
    if s.qk_norm == "head":
        q, k = rms(q, mixer.q_norm.weight, s.norm_eps), rms(k, mixer.k_norm.weight, s.norm_eps)
    q, k = turned(q, len(keys), s.rope), turned(k, len(keys), s.rope)
    keys, values = torch.cat([keys, k[None]]), torch.cat([values, v[None]])
    groups = s.num_heads // s.num_kv_heads
    heads = []
    for head in range(s.num_heads):
        weights = (keys[:, head // groups] @ q[head] / math.sqrt(s.head_dim)).softmax(0)
        heads.append(weights @ values[:, head // groups])
    o = torch.cat(heads)
    return (o * gate.sigmoid() if s.gated else o), keys, values


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """NaN, where there is any, is no small error."""
    return float((ours.double() - theirs).norm() / theirs.norm())


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    return ours.shape == theirs.shape and error(ours, theirs) < tolerance


def drawn(mixer: AttentionMixer, rows: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, sum(mixer.spec.in_proj_sizes)).to(dtype)


def check_step(mixer: AttentionMixer, paged: Paged, slots: list[int], dtype: torch.dtype) -> None:
    projected, before = drawn(mixer, len(slots), dtype), paged.bits()
    expected = [by_definition(mixer, row, *paged.history(s)) for row, s in zip(projected, slots, strict=True)]
    lengths = paged.pages.lengths.clone()
    o = attention_step(mixer, projected, paged.state, torch.tensor(slots))
    assert o.dtype == dtype
    assert torch.equal(paged.pages.lengths, lengths), "only the pool moves lengths on"
    check_written(paged, before, {slot: (e[1], e[2]) for slot, e in zip(slots, expected, strict=True)}, dtype)
    for i, (of_slot, *_) in enumerate(expected):
        assert close(o[i], of_slot, TOLERANCE[dtype]), f"row {i} of slot {slots[i]}"


def check_written(paged: Paged, before: list[torch.Tensor], expected: dict, dtype: torch.dtype) -> None:
    """The new tokens' keys and values are where they belong, and nothing else has changed."""
    after = paged.bits()
    for was, now, t, which in zip(before, after, (paged.state.keys, paged.state.values), (0, 1), strict=True):
        for slot, pair in expected.items():
            for position in range(int(paged.pages.lengths[slot]), len(pair[which])):
                written = paged.at(t, slot, position)
                assert close(written, pair[which][position], TOLERANCE[dtype])
                page = paged.pages.of(slot)[position // PAGE_TOKENS]
                was[page, :, position % PAGE_TOKENS] = now[page, :, position % PAGE_TOKENS]
        assert torch.equal(was, now)
