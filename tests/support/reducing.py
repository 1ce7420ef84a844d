"""Reducing a checkpoint to channels drawn at random."""

import torch

from pruning.reduction import Provenance, check_output, reduce_checkpoint
from pruning.selection import Selection
from pruning.surgery import Cut


def random_keep(spec, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.stack(
            [
                torch.randperm(mixer.d_k, generator=generator)[:n].sort().values
                for _ in range(mixer.num_k_heads)
            ]
        )
        for mixer, n in zip(spec.deltas.values(), widths, strict=True)
    )


def reduce(checkpoint, keep, out, *, export="sliced", overwrite=False, evaluate=None):
    replaces = check_output([checkpoint], out, overwrite=overwrite)
    report = [[{} for _ in layer] for layer in keep]
    cuts = tuple(Cut(i, k) for i, k in zip(checkpoint.spec.linear_layers, keep, strict=False))
    selection, made_by = Selection(cuts, report), Provenance("test", 0)
    return reduce_checkpoint(
        checkpoint, selection, made_by, out, export=export, replaces=replaces, evaluate=evaluate
    )


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())
