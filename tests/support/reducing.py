"""Reducing a checkpoint to channels drawn at random, and what the reduced model has to be."""

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


@torch.no_grad()
def masked_dense(checkpoint, keep, ids, offsets, *, eps_factor=True):
    """Hidden states and states of the dense model in float64, with q and k zeroed in every dropped channel.

    The sliced model scales q by n^-1/2 instead of d_k^-1/2, so its o is sqrt(d_k / n) times this one's. The output
    norm cancels that up to its eps, which this makes exact.
    """
    model = checkpoint.load(dtype=torch.float64)
    masks = {}
    for k, (layer, mixer) in zip(keep, model.deltas.items(), strict=True):
        m = mixer.spec
        masks[layer] = torch.zeros(m.num_k_heads, m.d_k, dtype=torch.float64).scatter(1, k, 1.0)
        if eps_factor:
            mixer.o_norm.eps *= k.shape[1] / m.d_k
    return model(ids, offsets, tap=lambda layer, x, q, k: (q * masks[layer], k * masks[layer]))


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())
