"""The language model: embeddings, blocks, final norm and head, for every family alike."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modeling.backends import TORCH, Backend
from modeling.layers import Block, RMSNorm, Tap
from modeling.ops import GatedDeltaRule
from modeling.spec import ModelSpec
from modeling.state import SequenceState, StatePool


class Model(nn.Module):
    """A linear-attention language model.

    Calibration, evaluation, recovery, training and prefill all use the one differentiable `forward`; generation uses
    `decode`, in place on a `StatePool`. Both return hidden states; `logits` turns the rows that are needed into
    log-odds over the vocabulary.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backend: Backend = TORCH
        # Given its weight, so that it is not drawn: on the meta device that would import half of torch (2 s).
        weight = torch.empty(spec.vocab_size, spec.hidden_size)
        self.embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(layer, spec.hidden_size, i) for i, layer in enumerate(spec.layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm.eps)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_embeddings:
            self.lm_head.weight = self.embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Sequence[int],
        state: SequenceState | None = None,
        *,
        rule: GatedDeltaRule | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, SequenceState]:
        """Run packed sequences.

        Args:
            input_ids: `[tokens]`, all sequences one after the other.
            cu_seqlens: offsets, `[0, ..., tokens]`; no sequence is empty.
            state: where each sequence goes on from; None for the beginning.
            rule: another gated delta rule than the back end's.
            tap: observes or replaces q and k of each layer (`modeling.layers.Tap`).

        Returns:
            Hidden states after the final norm, `[tokens, hidden]`, and each sequence's state after its last token.
        """
        if self.backend.prefill is not None and rule is None and tap is None:
            return self.backend.prefill(self, input_ids, cu_seqlens, state)
        rule = rule or self.backend.rule
        x = self.embeddings(input_ids)
        recurrent: list[Tensor] = []
        conv: list[Tensor] = []
        for i, block in enumerate(self.layers):
            x, r, c = block(
                x,
                cu_seqlens,
                None if state is None else state.recurrent[i],
                None if state is None else state.conv[i],
                rule,
                tap,
                self.backend.inputs,
            )
            recurrent.append(r)
            conv.append(c)
        return self.norm(x), SequenceState(recurrent, conv)

    def prefill(self, input_ids: Tensor, cu_seqlens: Sequence[int], pool: StatePool, slots: Tensor) -> Tensor:
        """`forward` of sequences whose states are in `pool` at `slots` `[sequences]`, and move on there.

        Layer by layer, only one layer's states are copied at a time: a batch of many short prompts needs no copy of all
        that it holds.

        Returns:
            Hidden states after the final norm, `[tokens, hidden]`.
        """
        if self.backend.prefill is not None:
            hidden, state = self.backend.prefill(self, input_ids, cu_seqlens, pool.gather(slots))
            pool.scatter(slots, state)
            return hidden
        x = self.embeddings(input_ids)
        for block, recurrent, conv in zip(self.layers, pool.recurrent, pool.conv, strict=True):
            before = recurrent[slots], conv[slots]
            x, r, c = block(x, cu_seqlens, *before, self.backend.rule, None, self.backend.inputs)
            recurrent[slots] = r.to(recurrent.dtype)
            conv[slots] = c.to(conv.dtype)
        y: Tensor = self.norm(x)
        return y

    def decode(self, input_ids: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        """One token of each of B requests; their states in `pool` move on by that token.

        Args:
            input_ids: `[B]`.
            pool: holds the states, updated in place.
            slots: `[B]`, distinct.

        Returns:
            Hidden states after the final norm, `[B, hidden]`.
        """
        return self.backend.decode(self, input_ids, pool, slots)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden]` -> `[n, vocab]`, in the parameters' dtype or float32."""
        return self.backend.head(hidden, self.lm_head.weight)
