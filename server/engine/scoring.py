"""Log-probabilities of given tokens, and their divergence from another engine's."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modeling.device import upload
from server.engine.device import Download
from server.engine.forward import Forward
from server.engine.request import Request
from server.wire.messages import KLReference, Score, TopLogprobs, pack_top

LOGIT_ROWS = 64
"""Logits are made for at most this many positions at a time: a row is as long as the vocabulary."""


def top_logprobs(ids: list[int], logprobs: list[float]) -> TopLogprobs:
    """Tokens and their log-probabilities as messages have them."""
    return list(zip(ids, logprobs, strict=True))


@dataclass(frozen=True)
class ScoreRows:
    """Scores of n consecutive positions of one request: logprob `[n]`; KL and top-1 agreement `[n]` or empty; the
    most likely tokens and their log-probabilities `[n, top]`."""

    request: Request
    logprobs: Tensor
    kl: Tensor
    agree: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def on_host(self, download: Download) -> "ScoreRows":
        """The same rows on the host, once the download is there."""
        return replace(
            self,
            logprobs=download.add(self.logprobs),
            kl=download.add(self.kl),
            agree=download.add(self.agree),
            top_ids=download.add(self.top_ids),
            top_logprobs=download.add(self.top_logprobs),
        )

    def collect(self) -> None:
        """Add the rows, which are on the host, to their request."""
        request = self.request
        request.logprobs += self.logprobs.tolist()
        request.kl += self.kl.tolist()
        request.agree += self.agree.tolist()
        if self.top_ids.shape[1]:
            rows = zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
            request.top += [pack_top(top_logprobs(*row)) for row in rows]


def score(forward: Forward, request: Request, start: int, end: int, hidden: Tensor) -> list[ScoreRows]:
    """Scores of the tokens that positions `start` to `end` predict: position p comes from the hidden state at p - 1.

    Args:
        hidden: of positions `start` to `end`.
    """
    message = request.message
    assert isinstance(message, Score)
    first = max(message.from_position, start + 1)
    last = min(end + 1, len(message.token_ids))
    result: list[ScoreRows] = []
    for row in range(first, last, LOGIT_ROWS):
        stop = min(row + LOGIT_ROWS, last)
        logits = forward.logits(hidden[row - 1 - start : stop - 1 - start])
        logprobs = logits.float().log_softmax(-1)
        targets = upload(torch.tensor(message.token_ids[row:stop]), logprobs.device)
        own = logprobs.gather(1, targets[:, None]).squeeze(1)
        kl, agree = _against_reference(message, row, logprobs)
        top = logprobs.topk(min(message.top_logprobs, logprobs.shape[1]), dim=-1)
        result.append(ScoreRows(request, own, kl, agree, top.indices, top.values))
    return result


def _against_reference(message: Score, start: int, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Write our rows for positions from `start` on, or compare them with the rows of the engine that did."""
    none = logprobs.new_empty(0), logprobs.new_empty(0, dtype=torch.bool)
    reference = message.kl_reference
    skip = 0 if reference is None else max(0, reference.from_position - start)
    if reference is None or skip >= len(logprobs):
        return none
    logprobs = logprobs[skip:]
    rows = _reference_rows(message, reference, logprobs.shape[1])
    if rows is None:
        return none
    at = start + skip - reference.from_position
    if reference.mode == "write":
        # Waits for the device: too large to keep until the collect.
        rows[at : at + len(logprobs)] = logprobs.cpu()
        return none
    theirs = upload(rows[at : at + len(logprobs)], logprobs.device)
    kl = (theirs.exp() * (theirs - logprobs)).sum(-1).clamp_min(0)  # rounding may make it -1e-9
    return kl, theirs.argmax(-1) == logprobs.argmax(-1)


def _reference_rows(message: Score, reference: KLReference, vocab: int) -> Tensor | None:
    """The shared file as `[positions, vocab]`. None if it is gone: the client has left and an abort is coming."""
    try:
        rows = np.memmap(reference.path, dtype=np.float32, mode="r+")
    except FileNotFoundError:
        return None
    return torch.from_numpy(rows).view(len(message.token_ids) - reference.from_position, vocab)
