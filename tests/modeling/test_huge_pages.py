"""Weights and states in large pages."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from modeling.huge_pages import PAGE_BYTES, gather_parameters, zeros


def is_large(tensor):
    """Whether the system was asked for large pages where the tensor lies."""
    at = tensor.data_ptr()
    found = re.finditer(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags:([^\n]*)$", Path("/proc/self/smaps").read_text(), re.M | re.S
    )
    return next("hg" in m[3].split() for m in found if int(m[1], 16) <= at < int(m[2], 16))


needs_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="this system has no large pages",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_pages
def test_zeros(dtype):
    large = zeros([3, PAGE_BYTES // 4, 5], dtype)
    assert large.shape == (3, PAGE_BYTES // 4, 5) and large.dtype == dtype and not large.any()
    assert is_large(large) and large.is_contiguous()
    large[1] = 2
    assert float(large.float().sum()) == 2 * large[1].numel()
    small = zeros([2, 3], dtype)
    assert not small.any() and not is_large(small)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Embedding(999, 701)
        self.norm = torch.nn.LayerNorm(701, dtype=torch.bfloat16)
        self.rest = torch.nn.Linear(701, 3, dtype=torch.float64)
        self.lm_head = torch.nn.Linear(701, 999, bias=False)
        self.lm_head.weight = self.embeddings.weight


@needs_pages
def test_parameters_keep_values_and_ties():
    model = Tied()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    gather_parameters(model)
    assert model.lm_head.weight is model.embeddings.weight
    for name, p in model.named_parameters():
        parameter, value = before[name]
        assert p is parameter and p.dtype == value.dtype and torch.equal(p, value)
        assert p.data_ptr() % 64 == 0 and p.requires_grad
    assert is_large(model.embeddings.weight) and is_large(model.rest.bias)
