"""Reducing a checkpoint to channels drawn at random."""

import torch

from pruning.reduction import Provenance, check_output, reduce_checkpoint
from pruning.selection import Selection


def random_keep(spec, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.stack(
            [
                torch.randperm(layer.mixer.d_k, generator=generator)[:n].sort().values
                for _ in range(layer.mixer.num_k_heads)
            ]
        )
        for layer, n in zip(spec.layers, widths, strict=True)
    )


def reduce(checkpoint, keep, out, *, overwrite=False, evaluate=None):
    replaces = check_output([checkpoint], out, overwrite=overwrite)
    report = [[{} for _ in layer] for layer in keep]
    selection, made_by = Selection(tuple(keep), report), Provenance("test", 0)
    return reduce_checkpoint(checkpoint, selection, made_by, out, replaces=replaces, evaluate=evaluate)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())
