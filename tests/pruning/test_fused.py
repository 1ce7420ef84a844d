"""Training by fla's kernels: on a CPU plain torch, and by Triton's interpreter what plain torch gives."""

import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.ops import RuleInputs, chunked_gated_delta_rule
from pruning import fused
from pruning.fused import CONFIGS, chunk_gradients, fla_gated_delta_rule, training_rule

SUPPORT = Path(__file__).parents[1] / "support"


def test_a_cpu_trains_in_plain_torch():
    assert training_rule(torch.device("cpu")) is None


def test_a_gpu_without_fla_trains_in_plain_torch_and_says_why(monkeypatch, caplog):
    def import_module(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(fused, "import_module", import_module)
    fused.chunk_rule.cache_clear()
    assert [training_rule(torch.device("cuda:3")) for _ in range(2)] == [None, None]
    (record,) = caplog.records  # once, however often a sweep asks
    assert "plain torch" in record.getMessage() and "no fla.ops" in record.getMessage()
    assert "pip install" in record.getMessage()


def test_keys_that_are_too_wide_for_fla_go_through_plain_torch():
    c = case([5, 9], [-0.1], d_k=257)
    inputs = RuleInputs(*c.leaves, c.scale, c.offsets)
    for found, expected in zip(fla_gated_delta_rule(inputs), chunked_gated_delta_rule(inputs), strict=True):
        assert found.equal(expected)


def fla_folder() -> Path:
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fla-core is not installed (extra gpu)")
    return Path(spec.submodule_search_locations[0])


def test_the_configurations_are_of_kernels_that_fla_has():
    sources = "\n".join(file.read_text() for file in fla_folder().rglob("*.py"))
    assert [name for name in CONFIGS if f"def {name}(" not in sources] == []


CHUNK = 64


@dataclass
class Case:
    """Inputs of the rule, float64 leaves, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    do: Tensor
    lengths: list[int]
    scale = 0.3

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    @property
    def offsets(self) -> list[int]:
        return [0, *itertools.accumulate(self.lengths)]


def case(lengths, decays, *, k_heads=1, heads=1, d_k=16, d_v=16):
    """`decays` are taken in turns by the tokens."""
    generator = torch.Generator().manual_seed(0)
    n = sum(lengths)

    def random(*shape):
        return torch.randn(n, *shape, dtype=torch.float64, generator=generator)

    q, k = (F.normalize(random(k_heads, d_k), dim=-1) for _ in range(2))
    g = torch.tensor(decays, dtype=torch.float64).repeat(n)[:n, None] * (1 + random(heads).abs())
    leaves = (t.requires_grad_() for t in (q, k, random(heads, d_v), g, random(heads).sigmoid()))
    return Case(*leaves, random(heads, d_v), lengths)


def in_chunks(c, *, packed, dtype=torch.float32):
    """The gradients of q, k, v, g and beta as fla's backward puts them together, with `chunk_gradients` in the middle:
    all others by autograd through each chunk."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in c.leaves]
    q, k, v, g, beta = leaves
    groups = v.shape[1] // k.shape[1]
    chunks = [
        slice(at, min(at + CHUNK, end))
        for begin, end in itertools.pairwise(c.offsets)
        for at in range(begin, end, CHUNK)
    ]
    sums = torch.cat([g[at].cumsum(0) for at in chunks])
    firsts = set(c.offsets)
    w, u, new, states, later = [], [], [], [], []
    # What `chunk_gradients` does not answer for, the way from q, k and g to o, has leaves of its own.
    own_q, own_k, own_sums = (t.detach().requires_grad_() for t in (q, k, sums))
    total = torch.zeros((), dtype=dtype)
    for at in chunks:
        if at.start in firsts:
            state = torch.zeros(v.shape[1], k.shape[2], v.shape[2], dtype=dtype, requires_grad=True)
        heads_of = [t[at].repeat_interleave(groups, 1).transpose(0, 1) for t in (k, own_q, own_k)]
        keys, (own_queries, own_keys) = heads_of[0], heads_of[1:]
        a, own_a = sums[at].T, own_sums[at].T
        ratio = (a[:, :, None] - a[:, None, :]).tril().exp().tril()
        b = beta[at].T[..., None]
        system = torch.eye(len(a[0]), dtype=dtype) + (b * ratio * (keys @ keys.mT)).tril(-1)
        w.append(torch.linalg.solve_triangular(system, b * a.exp()[..., None] * keys, upper=False))
        u.append(torch.linalg.solve_triangular(system, b * v[at].transpose(0, 1), upper=False))
        states.append(state.detach())
        new.append(u[-1] - w[-1] @ state)
        own_ratio = (own_a[:, :, None] - own_a[:, None, :]).tril().exp().tril()
        o = own_a.exp()[..., None] * (own_queries @ state) + (own_queries @ own_keys.mT * own_ratio) @ new[-1]
        total = total + (c.scale * o * c.do[at].transpose(0, 1).to(dtype)).sum()
        kept = own_keys * (own_a[:, -1:] - own_a).exp()[..., None]
        state = state * own_a[:, -1].exp()[:, None, None] + kept.mT @ new[-1]
        later.append(state)
    for t in (*new, *later):
        t.retain_grad()
    total.backward(retain_graph=True)
    of_new = [t.grad for t in new]
    of_later = [torch.zeros_like(t) if t.grad is None else t.grad for t in later]

    def tokens(parts):
        return torch.cat([t.detach().transpose(0, 1) for t in parts]).view(*shape, *parts[0].shape[::2])

    shape = (1, len(v)) if packed else (len(c.lengths), c.lengths[0])
    which = [[i, n] for i, length in enumerate(c.lengths) for n in range(-(-length // CHUNK))]
    dq, dk, dw, dg = chunk_gradients(
        q=q.detach().view(*shape, *q.shape[1:]),
        k=k.detach().view(*shape, *k.shape[1:]),
        v=tokens(new),
        w=tokens(w),
        g=(sums.detach() / math.log(2)).float().view(*shape, -1),
        h=torch.stack(states).unflatten(0, (shape[0], -1)),
        dv=tokens(of_new),
        do=c.do.to(dtype).view(*shape, *c.do.shape[1:]),
        dh=torch.stack(of_later).unflatten(0, (shape[0], -1)),
        scale=c.scale,
        cu_seqlens=torch.tensor(c.offsets) if packed else None,
        chunk_indices=torch.tensor(which) if packed else None,
        chunk_size=CHUNK,
    )
    for t in leaves:
        t.grad = None
    of_w = dw.flatten(0, 1)
    torch.autograd.backward(
        [*w, *u, sums],
        [*(of_w[at].transpose(0, 1).to(dtype) for at in chunks), *of_new, dg.flatten(0, 1).to(dtype)],
    )
    q.grad, k.grad = dq.flatten(0, 1), k.grad + dk.flatten(0, 1)
    return [t.grad for t in leaves]


@pytest.mark.parametrize(
    ("c", "packed"),
    [
        (case([128, 128], [-0.1]), False),
        (case([100, 100], [-0.1]), False),
        (case([70, 1, 64, 150], [-0.1]), True),
        (case([70, 130], [-0.1], k_heads=2, heads=6, d_k=24, d_v=40), True),
        (case([130], [0.0], d_k=8, d_v=32), True),
        (case([70, 130], [-50.0]), True),
        (case([70, 130], [-50.0, -0.001, -0.1, 0.0, -0.02]), True),
    ],
    ids=[
        "whole chunks",
        "partial chunks",
        "packed",
        "value heads",
        "no decay",
        "strong decay",
        "some strong decay",
    ],
)
def test_gradients_of_chunks_are_those_of_the_rule(c, packed):
    o, _ = chunked_gated_delta_rule(RuleInputs(*c.leaves, c.scale, c.offsets))
    expected = torch.autograd.grad(o, c.leaves, c.do)
    for found, wanted in zip(in_chunks(c, packed=packed), expected, strict=True):
        # Sums of a strong decay leave few digits for what decays little, and nothing is left of the gradient of g.
        assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm()) + 1e-5


@pytest.mark.slow
def test_the_fused_forward_and_its_gradients_are_those_of_plain_torch(tmp_path):
    shutil.copytree(fla_folder(), tmp_path / "fla")
    # The interpreter counts loops in plain integers, which have no method for a cast.
    kernel = tmp_path / "fla" / "ops" / "common" / "chunk_delta_h.py"
    kernel.write_text(kernel.read_text().replace("i_t.to(tl.int64)", "i_t"))
    done = subprocess.run(
        [sys.executable, SUPPORT / "interpret_fused.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {tuple(line.split()[:2]): float(line.split()[2]) for line in done.stdout.splitlines()}
    assert len(found) == 8
    # That of A_log is a small difference of large sums.
    assert max(found.values()) < 1e-4, found
