"""Runs a batch on the model: `pending = runner.launch(batch)`, then `pending.collect()`.

Sampled tokens stay on the device as the next step's input, so a step can be launched before the one before it has
been collected.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeling.model import Model
from modeling.state import StatePool
from server.engine.messages import Generate, KLReference, Score
from server.engine.request import Request
from server.engine.sampler import SamplingBatch, sample
from server.engine.scheduler import Batch, PrefillChunk

LOGIT_ROWS = 64
"""Logits are made for at most this many positions at a time: a row is as long as the vocabulary."""

BROKEN = -1
"""In place of a token, where the model's output is NaN or Inf."""


@dataclass(frozen=True)
class ScoreRows:
    """Scores of consecutive positions of one request: logprob, KL and top-1 agreement, each `[n]` or empty."""

    request: Request
    logprobs: Tensor
    kl: Tensor
    agree: Tensor


@dataclass(frozen=True)
class StepResult:
    """A collected step, on the host."""

    tokens: list[tuple[Request, int]]
    scores: list[ScoreRows]


class PendingStep:
    """A launched step; `collect` waits for the device and brings the results to the host."""

    def __init__(self, batch: Batch, sampled: list[Request], tokens: Tensor, scores: list[ScoreRows]) -> None:
        self.batch = batch
        self._sampled = sampled
        self._tokens = tokens
        self._scores = scores

    def collect(self) -> StepResult:
        tokens = self._tokens.tolist()
        scores = [ScoreRows(s.request, s.logprobs.cpu(), s.kl.cpu(), s.agree.cpu()) for s in self._scores]
        return StepResult(list(zip(self._sampled, tokens, strict=True)), scores)


class Runner:
    """One model and its state pool."""

    def __init__(self, model: Model, pool: StatePool) -> None:
        self._model = model
        self._pool = pool
        self._device = model.embeddings.weight.device
        self._last_token = torch.zeros(pool.num_slots, dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start a step: move the states on, sample a token for each decode and each prompt that ends."""
        hidden: list[Tensor] = []
        sampled: list[Request] = list(batch.decodes)
        positions = [request.sampled - 1 for request in batch.decodes]
        if batch.decodes:
            slots = self._slots(batch.decodes)
            hidden.append(self._model.decode(self._last_token[slots], self._pool, slots))
        scores: list[ScoreRows] = []
        if batch.prefills:
            chunks = self._prefill(batch.prefills)
            for chunk, rows in zip(batch.prefills, chunks, strict=True):
                if isinstance(chunk.request.message, Score):
                    scores += self._score(chunk, chunk.request.message, rows)
                elif chunk.is_last:
                    hidden.append(rows[-1:])
                    sampled.append(chunk.request)
                    positions.append(0)
        if not sampled:
            return PendingStep(batch, [], torch.empty(0, dtype=torch.long), scores)
        tokens = self._sample(torch.cat(hidden), sampled, positions)
        self._last_token[self._slots(sampled)] = tokens.clamp_min(0)
        return PendingStep(batch, sampled, tokens, scores)

    def _slots(self, requests: list[Request]) -> Tensor:
        return torch.tensor([request.slot for request in requests], device=self._device)

    def _prefill(self, prefills: list[PrefillChunk]) -> list[Tensor]:
        """Feed prompt chunks as packed sequences; hidden states of each chunk, `[tokens, hidden]`."""
        ids: list[int] = []
        cu_seqlens = [0]
        for chunk in prefills:
            ids += chunk.request.message.token_ids[chunk.start : chunk.end]
            cu_seqlens.append(len(ids))
        slots = self._slots([chunk.request for chunk in prefills])
        hidden, state = self._model(
            torch.tensor(ids, device=self._device), cu_seqlens, self._pool.gather(slots)
        )
        self._pool.scatter(slots, state)
        return list(hidden.split([chunk.end - chunk.start for chunk in prefills]))

    def _sample(self, hidden: Tensor, requests: list[Request], positions: list[int]) -> Tensor:
        tokens: list[Tensor] = []
        for start in range(0, len(requests), LOGIT_ROWS):
            at = slice(start, start + LOGIT_ROWS)
            rows = [r.message.sampling for r in requests[at] if isinstance(r.message, Generate)]
            logits = self._model.logits(hidden[at]).float()
            drawn = sample(logits, SamplingBatch(rows, positions[at]))
            tokens.append(drawn.where(logits.isfinite().all(-1), BROKEN))
        return torch.cat(tokens)

    def _score(self, chunk: PrefillChunk, message: Score, hidden: Tensor) -> list[ScoreRows]:
        """Scores of the tokens that this chunk's positions predict: position p comes from the hidden state at p - 1."""
        first = max(message.from_position, chunk.start + 1)
        last = min(chunk.end + 1, len(message.token_ids))
        result: list[ScoreRows] = []
        for start in range(first, last, LOGIT_ROWS):
            end = min(start + LOGIT_ROWS, last)
            logits = self._model.logits(hidden[start - 1 - chunk.start : end - 1 - chunk.start])
            logprobs = logits.float().log_softmax(-1)
            targets = torch.tensor(message.token_ids[start:end], device=self._device)
            own = logprobs.gather(1, targets[:, None]).squeeze(1)
            kl, agree = self._against_reference(message, start, logprobs)
            result.append(ScoreRows(chunk.request, own, kl, agree))
        return result

    def _against_reference(self, message: Score, start: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Write our rows for positions from `start` on, or compare them with the rows of the engine that did."""
        none = logprobs.new_empty(0), torch.empty(0, dtype=torch.bool)
        reference = message.kl_reference
        skip = 0 if reference is None else max(0, reference.from_position - start)
        if reference is None or skip >= len(logprobs):
            return none
        logprobs = logprobs[skip:]
        rows = self._reference_rows(message, reference)
        if rows is None:
            return none
        at = start + skip - reference.from_position
        if reference.mode == "write":
            rows[at : at + len(logprobs)] = logprobs.cpu()
            return none
        theirs = rows[at : at + len(logprobs)].to(self._device)
        kl = (theirs.exp() * (theirs - logprobs)).sum(-1).clamp_min(0)  # rounding may make it -1e-9
        return kl, theirs.argmax(-1) == logprobs.argmax(-1)

    def _reference_rows(self, message: Score, reference: KLReference) -> Tensor | None:
        """The shared file as `[positions, vocab]`. None if it is gone: the client has left and an abort is coming."""
        try:
            rows = np.memmap(reference.path, dtype=np.float32, mode="r+")
        except FileNotFoundError:
            return None
        return torch.from_numpy(rows).view(
            len(message.token_ids) - reference.from_position, self._model.spec.vocab_size
        )
