"""Surgery that mixes channels before it keeps some."""

import pytest
import torch
import torch.nn.functional as F
from checkpoints import DELTA, GATED, write_checkpoint
from reducing import difference, random_keep, reduce

from modeling.checkpoint import open_checkpoint
from pruning.errors import PruningError
from pruning.surgery import Cut, rotate_rows, write_reduced

CONFIGS = {
    "gated-conv-bias": {**GATED, "conv_bias": True},
    "delta": DELTA,
}


@pytest.fixture(params=CONFIGS)
def checkpoint(request, tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "dense", CONFIGS[request.param]))


def random_permutations(spec, seed=4):
    """Per layer a permutation of the channels of each head, as a rotation and as an order."""
    generator = torch.Generator().manual_seed(seed)
    orders = [
        torch.stack(
            [torch.randperm(layer.mixer.d_k, generator=generator) for _ in range(layer.mixer.num_k_heads)]
        )
        for layer in spec.layers
    ]
    return orders, [F.one_hot(order).double() for order in orders]


@torch.no_grad()
def test_a_rotation_that_is_a_permutation_only_reorders_channels(checkpoint, tmp_path):
    spec = checkpoint.spec
    orders, rotations = random_permutations(spec)
    # All of them: the same model.
    everything = [
        Cut(i, torch.arange(m).expand(len(o), -1), r)
        for i, m, o, r in zip(spec.linear_layers, spec.d_k, orders, rotations, strict=True)
    ]
    (tmp_path / "all").mkdir()
    write_reduced(checkpoint, everything, tmp_path / "all")
    ids = torch.arange(80)
    a, _ = checkpoint.load(dtype=torch.float64)(ids, [0, 80])
    b, _ = open_checkpoint(tmp_path / "all").load(dtype=torch.float64)(ids, [0, 80])
    assert difference(b, a) < 1e-10
    # The first 8 of them: the channels that the permutation put there.
    (tmp_path / "rotated").mkdir()
    first = [Cut(cut.layer, cut.keep[:, :8], cut.rotation) for cut in everything]
    write_reduced(checkpoint, first, tmp_path / "rotated")
    kept = tuple(order[:, :8].sort(dim=1).values for order in orders)
    reduce(checkpoint, kept, tmp_path / "kept")
    a, _ = open_checkpoint(tmp_path / "kept").load(dtype=torch.float64)(ids, [0, 80])
    b, _ = open_checkpoint(tmp_path / "rotated").load(dtype=torch.float64)(ids, [0, 80])
    assert difference(b, a) < 1e-10


def test_rotated_rows_are_mixtures_and_filters_are_means():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)).Q
    rows = torch.arange(1, 9).view(1, 2, 4)  # row 0 is no key
    weights = torch.randn(9, 5, generator=generator)
    mixed = rotate_rows(weights, rows, rotation, filters=False)
    assert torch.equal(mixed[0], weights[0]) and mixed.dtype == torch.float32
    for h in range(2):
        block = weights[1 + 4 * h : 5 + 4 * h].double()
        assert difference(mixed[1 + 4 * h : 5 + 4 * h].double(), rotation[h] @ block) < 1e-6
    # Filters that are alike stay what they are: the case in which rotating before the convolution is exact.
    alike = torch.randn(1, 1, 3, generator=generator).expand(9, 1, 3).contiguous()
    assert difference(rotate_rows(alike, rows, rotation, filters=True), alike) < 1e-6
    biases = rotate_rows(weights[:, 0], rows, rotation, filters=False)
    assert torch.equal(biases, mixed[:, 0])


def test_a_rotation_of_another_shape_is_refused(tmp_path):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "dense", GATED))
    keep = random_keep(checkpoint.spec, (8, 8, 8))
    cuts = [Cut(i, k, torch.eye(8).double().expand(2, 8, 8)) for i, k in enumerate(keep)]
    with pytest.raises(PruningError, match=r"rotation of layer 0 is \[2, 8, 8\]; it must be \[2, 32, 32\]"):
        write_reduced(checkpoint, cuts, tmp_path)
