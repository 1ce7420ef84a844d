"""Runs a batch on the model: `pending = runner.launch(batch)`, then `pending.collect()`.

Sampled tokens stay on the device as the next step's input, so a step can be launched before the one before it has
been collected.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.model import Model
from modeling.state import StatePool
from server.engine.forward import Forward, InvariantForward
from server.engine.messages import Generate, Score, TopLogprobs
from server.engine.request import Request
from server.engine.sampler import Plan, Sampled, Sampler
from server.engine.scheduler import Batch, PrefillChunk
from server.engine.scoring import LOGIT_ROWS, ScoreRows, score, top_logprobs

BROKEN = -1
"""In place of a token, where the model's output is NaN or Inf."""


class NewToken(NamedTuple):
    """A sampled token, on the host; `logprob` and `top` where the request wants them."""

    request: Request
    token: int
    logprob: float | None = None
    top: TopLogprobs | None = None


@dataclass(frozen=True)
class StepResult:
    """A collected step, on the host."""

    tokens: list[NewToken]


class PendingStep:
    """A launched step; `collect` waits for the device and brings the results to the host."""

    def __init__(self, batch: Batch, sampled: list[tuple[Plan, Sampled]], scores: list[ScoreRows]) -> None:
        self.batch = batch
        self._sampled = sampled
        self._scores = scores

    def collect(self) -> StepResult:
        """The tokens; scores go to their requests."""
        tokens: list[NewToken] = []
        for plan, sampled in self._sampled:
            new = [NewToken(r, t) for r, t in zip(plan.requests, sampled.tokens.tolist(), strict=True)]
            for row, logprob, top in _reports(plan, sampled):
                new[row] = NewToken(new[row].request, new[row].token, logprob, top)
            tokens += new
        for rows in self._scores:
            rows.collect()
        return StepResult(tokens)


def _reports(plan: Plan, sampled: Sampled) -> list[tuple[int, float, TopLogprobs]]:
    """(row, log-probability, most likely tokens) of the rows that want them."""
    if sampled.logprobs is None:
        return []
    own = sampled.logprobs.tolist()
    ids = [[]] * len(own) if sampled.top_ids is None else sampled.top_ids.tolist()
    values = [[]] * len(own) if sampled.top_logprobs is None else sampled.top_logprobs.tolist()
    return [
        (row, own[n], top_logprobs(ids[n], values[n])[: plan.wanted[n]])
        for n, row in enumerate(plan.reported_rows)
    ]


class Runner:
    """One model and the states of its requests.

    Args:
        batch_invariant: a request's logits are the same bits whatever else runs; slower.
    """

    def __init__(self, model: Model, pool: StatePool, *, batch_invariant: bool = False) -> None:
        self._forward = (InvariantForward if batch_invariant else Forward)(model, pool)
        self._pool = pool
        self._device = self._forward.device
        rows = pool.num_slots + 1
        self._sampler = Sampler(rows, model.spec.vocab_size, self._device)
        self._last_token = torch.zeros(rows, dtype=torch.long, device=self._device)
        # Made anew only when the batch is another one.
        self._decoding: list[Request] = []
        self._decode_slots = torch.empty(0, dtype=torch.long, device=self._device)
        self._planned: list[Request] = []
        self._plans: list[Plan] = []

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start a step: move the states on, sample a token for each decode and each prompt that ends."""
        hidden: list[Tensor] = []
        sampled = list(batch.decodes)
        scores: list[ScoreRows] = []
        if batch.decodes:
            slots = self._slots_of(batch.decodes)
            hidden.append(self._forward.decode(self._last_token[slots], slots))
        if batch.prefills:
            chunks = self._forward.prefill(
                [chunk.request.message.token_ids[chunk.start : chunk.end] for chunk in batch.prefills],
                [chunk.request.slot for chunk in batch.prefills],
            )
            for chunk, rows in zip(batch.prefills, chunks, strict=True):
                if isinstance(chunk.request.message, Score):
                    scores += score(self._forward, chunk.request, chunk.start, chunk.end, rows)
                elif chunk.is_last and isinstance(chunk.request.message, Generate):
                    new = self._fork(chunk)
                    hidden.append(rows[-1:].expand(len(new), -1))
                    sampled += new
            self._sampler.start(sampled[len(batch.decodes) :])
        return PendingStep(batch, self._sample(torch.cat(hidden), sampled) if sampled else [], scores)

    def _slots_of(self, decodes: list[Request]) -> Tensor:
        if decodes != self._decoding:
            self._decoding = decodes
            self._decode_slots = torch.tensor([r.slot for r in decodes], device=self._device)
        return self._decode_slots

    def _fork(self, chunk: PrefillChunk) -> list[Request]:
        """The requests that sample after this prompt, each with the state in its slot."""
        for request in chunk.forks:
            self._pool.copy(chunk.request.slot, request.slot)
        return [chunk.request, *chunk.forks]

    def _sample(self, hidden: Tensor, requests: list[Request]) -> list[tuple[Plan, Sampled]]:
        """Next token of each row of hidden states `[n, hidden]`."""
        starts = range(0, len(requests), LOGIT_ROWS)
        if requests != self._planned:
            self._planned = requests
            self._plans = [self._sampler.plan(requests[start : start + LOGIT_ROWS]) for start in starts]
        result: list[tuple[Plan, Sampled]] = []
        for start, plan in zip(starts, self._plans, strict=True):
            logits = self._forward.logits(hidden[start : start + LOGIT_ROWS])
            sampled = self._sampler.sample(logits, plan)
            self._last_token[plan.slots] = sampled.tokens
            sampled.tokens.masked_fill_(~logits.isfinite().all(-1), BROKEN)
            result.append((plan, sampled))
        return result
