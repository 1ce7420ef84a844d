"""The language model: embeddings, blocks, final norm and head, for every family alike."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.layers import Block, DeltaMixer, RMSNorm, Tap
from modeling.ops import GatedDeltaRule
from modeling.spec import ModelSpec
from modeling.state import SequenceState


class Model(nn.Module):
    """A language model with linear-attention layers, in plain torch operations: any device, differentiable.

    Calibration, evaluation, recovery and training use it; what serves it is `modeling.runtime.compile_model(model)`.
    Its forward gives hidden states; `logits` turns the rows that are needed into log-odds over the vocabulary."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        # Given its weight, so that it is not drawn: on the meta device that would import half of torch (2 s).
        weight = torch.empty(spec.vocab_size, spec.hidden_size)
        self.embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(layer, spec.hidden_size, i) for i, layer in enumerate(spec.layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm.eps)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight

    @property
    def blocks(self) -> list[Block]:
        """The modules of `layers`, which torch types as any module."""
        return [cast(Block, block) for block in self.layers]

    @property
    def deltas(self) -> dict[int, DeltaMixer]:
        """The linear-attention mixers by the index of their layer (`ModelSpec.deltas`)."""
        mixers = {i: block.mixer for i, block in enumerate(self.blocks)}
        return {i: mixer for i, mixer in mixers.items() if isinstance(mixer, DeltaMixer)}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.embeddings.weight.device

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Sequence[int],
        states: Sequence[SequenceState] | None = None,
        *,
        rule: GatedDeltaRule | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, list[SequenceState]]:
        """Run packed sequences.

        Args:
            input_ids: `[tokens]`, all sequences one after the other.
            cu_seqlens: offsets, `[0, ..., tokens]`; no sequence is empty.
            states: where each sequence goes on from, one for each layer; None for the beginning.
            rule: the gated delta rule of the linear layers; None for `chunked_gated_delta_rule`.
            tap: observes or replaces q and k of each linear layer (`modeling.layers.Tap`).

        Returns:
            Hidden states after the final norm, `[tokens, hidden]`, and each layer's states after the last tokens.
        """
        x = self.embeddings(input_ids)
        after: list[SequenceState] = []
        for i, block in enumerate(self.layers):
            x, state = block(x, cu_seqlens, None if states is None else states[i], rule=rule, tap=tap)
            after.append(state)
        return self.norm(x), after

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden]` -> `[n, vocab]`, in the parameters' dtype."""
        return F.linear(hidden, self.lm_head.weight)
