"""Runs a batch on the model: `forward = runner.launch(batch)`, `pending = runner.sample(forward, masks)`, then
`pending.collect()`.

Sampled tokens stay on the device as the next step's input, so a step can be launched before the one before it has
been collected. Nothing in the first two waits for the device; a collect waits once, for its own step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from modeling.device import upload
from modeling.runtime import Runtime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.state import StatePool
from server.engine.batch import Batch, PrefillChunk, Swap
from server.engine.device import HOST, Device, Download
from server.engine.forward import Forward, InvariantForward
from server.engine.request import Request
from server.engine.sampler import Plan, Sampled, Sampler
from server.engine.scoring import ScoreRows, score, top_logprobs
from server.wire.messages import Generate, Score, TopLogprobs

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
    """A launched step, its results on their way to the host; `collect` waits for them.

    `failed` are requests of the batch for which the device had no memory left: nothing comes of their work, and their
    states are of no use any more.
    """

    def __init__(
        self,
        batch: Batch,
        sampled: list[tuple[Plan, Sampled]],
        scores: list[ScoreRows],
        download: Download,
        failed: list[Request],
    ) -> None:
        self.batch = batch
        self.failed = failed
        self._sampled = [(plan, _on_host(s, download)) for plan, s in sampled]
        self._scores = [rows.on_host(download) for rows in scores]
        self._download = download
        download.seal()

    def collect(self) -> StepResult:
        """Wait for the step's tokens and return them. Scores go to their requests."""
        self._download.wait()
        tokens: list[NewToken] = []
        for plan, sampled in self._sampled:
            new = [NewToken(r, t) for r, t in zip(plan.requests, sampled.tokens.tolist(), strict=True)]
            for row, logprob, top in _reports(plan, sampled):
                new[row] = NewToken(new[row].request, new[row].token, logprob, top)
            tokens += new
        for rows in self._scores:
            rows.collect()
        return StepResult(tokens)


def _on_host(sampled: Sampled, download: Download) -> Sampled:
    """The host's copies of these tensors, to be read once the download is there."""

    def add(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else download.add(tensor)

    tokens = download.add(sampled.tokens)
    return Sampled(tokens, add(sampled.logprobs), add(sampled.top_logprobs), add(sampled.top_ids))


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


@dataclass(frozen=True)
class ForwardPass:
    """A batch that is on its way through the model, and has not been sampled from.

    Args:
        hidden: what is sampled from, `[n, hidden]`, valid until the next launch; None if nothing is.
        plans: how, piece by piece.
        failed: requests for which the device had no memory left.
    """

    batch: Batch
    hidden: Tensor | None
    plans: list[Plan]
    scores: list[ScoreRows]
    failed: list[Request]

    @property
    def constrained(self) -> list[Request]:
        """The requests that are sampled by masks, in the order of these."""
        return [request for plan in self.plans for request in plan.constrained]


class Runner:
    """One model and the states of its requests.

    Args:
        batch_invariant: a request's logits are the same bits whatever else runs; slower.
        device: where the model is.
        graphs: recorded decode steps on this model and pool.
    """

    def __init__(
        self,
        runtime: Runtime,
        pool: StatePool,
        *,
        batch_invariant: bool = False,
        device: Device = HOST,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._forward = (InvariantForward if batch_invariant else Forward)(runtime, pool, graphs)
        self._pool = pool
        self._device = device
        self._at = self._forward.device
        rows = pool.num_slots + 1
        self._sampler = Sampler(rows, runtime.model.spec.vocab_size, self._at)
        self._last_token = torch.zeros(rows, dtype=torch.long, device=self._at)
        # These are what a step reads of its batch. They are made anew only when the batch is another one.
        self._decoding: list[Request] = []
        self._decode_slots = torch.empty(0, dtype=torch.long, device=self._at)
        self._planned: list[Request] = []
        self._plans: list[Plan] = []

    @torch.inference_mode()
    def launch(self, batch: Batch) -> ForwardPass:
        """Start a step: move the states on. `sample` then gives each decode and each prompt that ends its next token.

        Out of memory, prompts fail and decodes go on; or, if it was the decodes that had none, all of the batch fails.
        A request that is preempted, or goes on, fails alone.
        """
        scores: list[ScoreRows] = []
        failed: list[Request] = []
        hidden: Tensor | None = None
        plans: list[Plan] = []
        lost = self._swap_all(batch.swaps)
        decodes = [r for r in batch.decodes if r not in lost]
        try:
            rows = self._decode(decodes)
            requests = list(decodes)
            try:
                ends, scores = self._prefill(batch.prefills)
                for request, row in ends:
                    requests.append(request)
                    rows.append(row)
            except torch.OutOfMemoryError:
                failed = batch.requests[len(batch.decodes) :]
            if requests:
                hidden = torch.cat(rows)
                plans = self._plan(requests)
        except torch.OutOfMemoryError:
            hidden, plans, scores, failed = None, [], [], batch.requests
        failed += [r for r in lost if r not in failed]
        return ForwardPass(batch, hidden, plans, scores, failed)

    @torch.inference_mode()
    def sample(self, forward: ForwardPass, masks: Tensor | None = None) -> PendingStep:
        """Sample from what has been launched. Out of memory, all of the batch fails.

        Args:
            masks: which tokens the constrained requests may have, on the host (`Grammars.masks`); None if there are no
                such requests.
        """
        batch, scores, failed = forward.batch, forward.scores, forward.failed
        sampled: list[tuple[Plan, Sampled]] = []
        try:
            if forward.hidden is not None:
                sampled = self._sample(forward.hidden, forward.plans, masks)
        except torch.OutOfMemoryError:
            sampled, scores, failed = [], [], batch.requests
        if failed:  # here, not in a handler, where the exception still holds tensors
            self._device.release_memory()
        return PendingStep(batch, sampled, scores, self._device.download(), failed)

    def _swap_all(self, swaps: list[Swap]) -> list[Request]:
        """The requests for which there was no memory."""
        lost: list[Request] = []
        for swap in swaps:
            try:
                self._swap(swap)
            except torch.OutOfMemoryError:
                lost.append(swap.request)
        return lost

    def _swap(self, swap: Swap) -> None:
        """Copy where a request's sampling is, out of the slot that it had or into the one that it has now."""
        request, slot = swap.request, swap.slot
        if not request.sampled:  # it was preempted within its prompt
            return
        if swap.out:
            request.sampler_row = self._sampler.save(slot, self._last_token[slot].clone())
        elif request.sampler_row is not None:
            self._sampler.load(slot, request.sampler_row)
            self._last_token[slot] = request.sampler_row.last_token
            request.sampler_row = None
            self._decoding, self._planned = [], []  # a batch of the same requests is in other slots now

    def _decode(self, decodes: list[Request]) -> list[Tensor]:
        if not decodes:
            return []
        slots = self._slots_of(decodes)
        return [self._forward.decode(self._last_token[slots], slots)]

    def _prefill(self, prefills: list[PrefillChunk]) -> tuple[list[tuple[Request, Tensor]], list[ScoreRows]]:
        """The requests that sample now, each with the hidden state of its last token `[1, hidden]`, and scores."""
        ends: list[tuple[Request, Tensor]] = []
        scores: list[ScoreRows] = []
        if not prefills:
            return ends, scores
        chunks = self._forward.prefill(
            [chunk.request.message.token_ids[chunk.start : chunk.end] for chunk in prefills],
            [chunk.request.slot for chunk in prefills],
        )
        for chunk, rows in zip(prefills, chunks, strict=True):
            if isinstance(chunk.request.message, Score):
                scores += score(self._forward, chunk.request, chunk.start, chunk.end, rows)
            elif chunk.is_last and isinstance(chunk.request.message, Generate):
                ends += [(request, rows[-1:]) for request in self._fork(chunk)]
        self._sampler.start([request for request, _ in ends])
        return ends, scores

    def _slots_of(self, decodes: list[Request]) -> Tensor:
        if decodes != self._decoding:
            self._decoding = decodes
            self._decode_slots = upload(torch.tensor([r.slot for r in decodes]), self._at)
        return self._decode_slots

    def _fork(self, chunk: PrefillChunk) -> list[Request]:
        """The requests that sample after this prompt, each with the state in its slot."""
        for request in chunk.forks:
            self._pool.copy(chunk.request.slot, request.slot)
        return [chunk.request, *chunk.forks]

    def _plan(self, requests: list[Request]) -> list[Plan]:
        """How to sample for these requests, as many at a time as there may be logits."""
        if requests != self._planned:
            most = self._device.logit_rows
            self._plans = [
                self._sampler.plan(requests[start : start + most]) for start in range(0, len(requests), most)
            ]
            self._planned = requests
        return self._plans

    def _sample(self, hidden: Tensor, plans: list[Plan], masks: Tensor | None) -> list[tuple[Plan, Sampled]]:
        """Next token of each row of hidden states `[n, hidden]`."""
        allowed = None if masks is None else upload(masks, self._at)
        result: list[tuple[Plan, Sampled]] = []
        row = mask = 0
        for plan in plans:
            logits = self._forward.logits(hidden[row : row + len(plan.requests)])
            row += len(plan.requests)
            least, most_likely = logits.aminmax(dim=-1)  # in one pass; NaN if any is
            broken = ~(least.isfinite() & most_likely.isfinite())
            own = None if allowed is None else allowed[mask : mask + len(plan.constrained)]
            mask += len(plan.constrained)
            sampled = self._sampler.sample(logits, plan, own)
            self._last_token[plan.slots] = sampled.tokens
            sampled.tokens.masked_fill_(broken, BROKEN)
            result.append((plan, sampled))
        return result
