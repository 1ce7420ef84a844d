"""mlx-lm, unmodified: hybrids and what we reduce of them load in it, and its logits are ours."""

import pytest
import torch
from hybrids import CASES, write_hybrid
from mlx_logits import mlx_logits
from reducing import difference, random_keep, reduce

from modeling.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

# It reads configs with a text_config, full attention at an interval, and OLMo's norms by their published names only.
KEPT = {"vl-dense-three-value-heads": 4, "vl-dense-tied": 7, "vl-moe-fused": 8, "next": 5, "olmo": 6}
IDS = torch.randint(1, 257, (70,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Dense checkpoints and reduced ones, by name."""
    directory = tmp_path_factory.mktemp("hybrids")
    paths = {}
    for i, (name, n) in enumerate(KEPT.items()):
        paths[name] = write_hybrid(directory / name, CASES[name], seed=i)
        checkpoint = open_checkpoint(paths[name])
        paths[f"{name}-reduced"] = directory / f"{name}-reduced"
        keep = random_keep(checkpoint.spec, (n,) * len(checkpoint.spec.d_k))
        reduce(checkpoint, keep, paths[f"{name}-reduced"])
    return paths


@torch.no_grad()
def test_logits_are_ours(paths, clients, tmp_path):
    """Both compute in float32, whose rounding is 1e-7; eight layers make about 1e-6 of it."""
    theirs = mlx_logits(clients / "python", tmp_path, paths, IDS.tolist())
    for name, path in paths.items():
        model = open_checkpoint(path).load()
        logits = model.logits(model(IDS, [0, len(IDS)])[0])
        assert difference(logits, theirs[name]) < 1e-5, name
