"""What states in fewer bits cost: one model with its states in each dtype that a server offers.

The model reads token by token, by the decode step of the runtime that would serve it, so that states are rounded after
every token. That is the most that a server ever rounds: while it reads a prompt, it does so once a piece. All dtypes
take a step before any takes the next one, so that their predictions are compared as they arise and need not be kept.
"""

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.ops import wide
from modeling.runtime import Runtime, UnavailableError
from modeling.spec import STATE_DTYPES, StateDType, StateTypes
from modeling.state import StatePool
from pruning.errors import PruningError
from pruning.evaluation.identifiers import IdentifierRecall, Identifiers, identifier_recall
from pruning.evaluation.likelihood import (
    Divergence,
    Perplexity,
    TokenScores,
    check_vocabularies,
    mean_perplexity,
)
from pruning.evaluation.recall import Answers, Prompts, Recall
from pruning.evaluation.samples import Estimate, estimate
from pruning.progress import Advance, no_progress

LONGEST = 32_768
"""Tokens of a window for the drift with length, if the text has them."""
FIRST_OCTAVE = 512
BLOCK = 64
"""Neighbouring tokens that count as one sample of a long window."""
MEMORY = 2 << 30
"""Bytes that states and predictions of the windows that are read together may take."""


@dataclass(frozen=True)
class Octave:
    """Targets `begin` to `end` of each long window: what states predict that have seen so many tokens."""

    begin: int
    end: int
    loss: float
    """Mean cross entropy in nats."""
    loss_rise: Estimate | None
    """Loss minus that with float32 states of the same model, in nats per token; samples are blocks of `BLOCK` tokens.
    None for float32."""
    kl: Estimate | None
    """KL(float32 states of the same model || these), in nats per token, likewise."""


@dataclass(frozen=True)
class Drift:
    """How errors grow along long windows, which each start from an empty state."""

    windows: int
    window: int
    """Tokens of each."""
    octaves: list[Octave]


@dataclass(frozen=True)
class Bits:
    """One model with its states in one dtype."""

    state_dtype: StateDType
    state_bytes: int
    """Bytes of one request's state."""
    back_end: str
    """The runtime that was measured."""
    perplexity: Perplexity
    divergence: Divergence | None
    """How its predictions differ from the baseline's with float32 states; None for these themselves."""
    loss_rise: Estimate | None
    """Loss minus that with float32 states of the same model, in nats per token; samples are windows. None for
    float32."""
    recall: list[Recall]
    drift: Drift
    identifiers: list[IdentifierRecall] | None = None
    """How well identifiers of the perplexity's windows are recalled, against the baseline with float32 states; None
    where that was not measured."""


@dataclass(frozen=True)
class BitsText:
    """What is read for `bits`."""

    windows: Tensor
    """int64 `[count, window + 1]` for the perplexity (`evaluation_windows`)."""
    stride: int | None
    """The last so many targets of each window are scored; None for all."""
    long: Tensor
    """int64 `[count, window + 1]` for the drift with length (`long_windows`)."""
    prompts: Sequence[Prompts]
    identifiers: Identifiers | None = None
    """Those of `windows`; None to leave them out."""

    def tokens(self, *, alone: bool) -> int:
        """How many tokens `bits` advances by, of the baseline itself (`alone`) or of another model."""
        windows, long = self.windows[:, 1:].numel(), self.long[:, 1:].numel()
        asked = sum(p.ids[:, 1:].numel() for p in self.prompts)
        return len(STATE_DTYPES) * (windows + long + asked) + (0 if alone else windows)


@torch.no_grad()
def bits(
    runtime: Runtime, baseline: Runtime | None, text: BitsText, *, advance: Advance = no_progress
) -> list[Bits]:
    """What the model that `runtime` computes is worth at each of `STATE_DTYPES`.

    Args:
        baseline: computes the model to compare with; None for this model itself.

    Raises:
        PruningError: the vocabularies differ, a model gives NaN or Inf, or there is nothing on this device that
            computes its states in one of the dtypes.
    """
    readers = [_Reader(runtime, dtype) for dtype in STATE_DTYPES]
    full = readers[0]  # float32
    against = full
    if baseline is not None:
        check_vocabularies(runtime.model, baseline.model)
        against = _Reader(baseline, full.dtype)
    windows, scored = text.windows, text.stride or text.windows.shape[1] - 1
    read = _read(readers, against, windows, scored, scored, advance)
    long = text.long[:, 1:].shape[1]
    drifted = _read(readers, full, text.long, long, min(BLOCK, long), advance)
    recalled = [[_recall(reader, p, advance) for p in text.prompts] for reader in readers]
    found = []
    for i, reader in enumerate(readers):
        perplexity = mean_perplexity([read.loss[i].sum()], windows, text.stride)
        divergence = None
        if reader is not against:
            kl, agreement = float(read.kl[i].mean()) / scored, float(read.agreed[i].mean()) / scored
            divergence = Divergence(kl, agreement, perplexity.tokens)
        rise = None if reader is full else estimate((read.loss[i] - read.loss[0]) / scored)
        words = None
        if text.identifiers is not None:
            first = None if reader is against else read.baseline
            words = identifier_recall(text.identifiers, read.scores[i], first)
        found.append(
            Bits(
                reader.dtype,
                reader.state_bytes,
                runtime.name,
                perplexity,
                divergence,
                rise,
                recalled[i],
                _drift(drifted, i, long),
                words,
            )
        )
    return found


class _Reader:
    """One model that reads rows of tokens, its states in one dtype."""

    def __init__(self, runtime: Runtime, dtype: StateDType) -> None:
        model = runtime.model
        self.dtype, self.device = dtype, model.device
        self._runtime = runtime
        self._types = StateTypes.named(dtype, model.embeddings.weight.dtype)
        try:
            runtime.check_states(self._types)
        except UnavailableError as e:
            raise PruningError(f"{e}; on a CPU all dtypes can be measured (--device cpu)") from e
        self.state_bytes = model.spec.state_bytes(0, self._types)

    def bytes_per_row(self, length: int) -> int:
        """Bytes that a row of `length` tokens takes at its end: its state, whose KV cache grows with them, and its
        prediction, the logarithm of that, and what is made of both."""
        spec = self._runtime.model.spec
        return spec.state_bytes(length, self._types) + 4 * spec.vocab_size * torch.float32.itemsize

    def begin(self, rows: int, length: int) -> None:
        """Forget everything; `rows` rows of up to `length` tokens are read from now on."""
        spec = self._runtime.model.spec
        self._pool: StatePool | None = None  # the old one goes before there is a new one
        self._pool = StatePool.with_room(spec, rows, length, device=self.device, types=self._types)
        self._slots = torch.arange(rows, device=self.device)

    def step(self, ids: Tensor) -> Tensor:
        """Hidden states after the next token `[rows]`."""
        assert self._pool is not None
        return self._runtime.decode(ids, self._pool, self._slots)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the token after the last one, `[rows, vocab]`."""
        return wide(self._runtime.logits(hidden)).log_softmax(-1)


def _steps(
    readers: Sequence[_Reader], rows: Tensor, wanted: Collection[int], advance: Advance
) -> Iterator[tuple[int, list[Tensor], Tensor]]:
    """All readers read `rows` int64 `[n, length]`, but for the last column, in lockstep.

    Yields, for each of the `wanted` columns, its index, each reader's log-probabilities `[n, vocab]` of the column
    after it, and that column.
    """
    for reader in readers:
        reader.begin(*rows.shape)
    columns = rows.to(readers[0].device).T.contiguous().unbind()
    for at, (ids, targets) in enumerate(itertools.pairwise(columns)):
        hidden = [reader.step(ids) for reader in readers]
        if at in wanted:
            yield at, [reader.log_probs(h) for reader, h in zip(readers, hidden, strict=True)], targets
        advance(len(readers) * len(rows))


def _batches(readers: Sequence[_Reader], rows: Tensor) -> Iterator[Tensor]:
    """`rows` int64 `[n, length]`, as many at once as `MEMORY` holds."""
    row = sum(reader.bytes_per_row(rows.shape[1]) for reader in readers)
    return iter(rows.split(max(1, MEMORY // row)))


@dataclass(frozen=True)
class _Read:
    """What all readers make of some windows. Sums over blocks of targets are float64 `[readers, windows, blocks]`."""

    scores: list[TokenScores]
    """Each reader's."""
    baseline: TokenScores
    loss: Tensor
    kl: Tensor
    agreed: Tensor
    block: int
    """Targets in a block."""


def _read(
    readers: Sequence[_Reader], against: _Reader, windows: Tensor, scored: int, block: int, advance: Advance
) -> _Read:
    """Score the last `scored` targets of `windows` `[count, window + 1]`; KL and agreement are with `against`."""
    count, length = windows.shape[0], windows.shape[1] - 1
    together = list(readers) if against in readers else [*readers, against]
    reference = together.index(against)
    every, sums = (len(together), count, scored), (len(readers), count, scored // block)
    log_prob = torch.zeros(every, dtype=torch.float64, device=against.device)
    top1 = torch.zeros(every, dtype=torch.bool, device=against.device)
    kl, agreed = (torch.zeros(sums, dtype=torch.float64, device=against.device) for _ in range(2))
    first = length - scored
    begin = 0
    for rows in _batches(together, windows):
        part = slice(begin, begin + len(rows))
        begin += len(rows)
        for at, predicted, targets in _steps(together, rows, range(first, length), advance):
            b = (at - first) // block
            log_p = predicted[reference]
            p, best = log_p.exp(), log_p.argmax(-1)
            for i, log_q in enumerate(predicted):
                likeliest = log_q.argmax(-1)
                log_prob[i, part, at - first] = log_q.gather(-1, targets[:, None])[:, 0].double()
                top1[i, part, at - first] = likeliest == targets
                if i != reference:
                    kl[i, part, b] += (p * (log_p - log_q)).sum(-1, dtype=torch.float64)
                    agreed[i, part, b] += likeliest == best
    loss = -log_prob[: len(readers)].unflatten(-1, (-1, block)).sum(-1)
    for i, reader in enumerate(readers):
        for name, values in (("loss", loss[i]), ("KL", kl[i])):
            if not bool(values.isfinite().all()):
                raise PruningError(f"states in {reader.dtype}: the {name} is NaN or Inf on this text")
    scores = [TokenScores(p, hits) for p, hits in zip(log_prob.cpu(), top1.cpu(), strict=True)]
    return _Read(scores[: len(readers)], scores[reference], loss.cpu(), kl.cpu(), agreed.cpu(), block)


def _recall(reader: _Reader, prompts: Prompts, advance: Advance) -> Recall:
    answers = Answers(prompts, reader.device)
    at = {position: query for query, position in enumerate(prompts.queries.tolist())}
    for rows in _batches([reader], prompts.ids):
        rows = rows.to(reader.device)
        for position, (log_probs,), _ in _steps([reader], rows, at, advance):
            answers.add(rows, at[position], log_probs)
    return answers.recall()


def octaves(window: int) -> list[tuple[int, int]]:
    """Where octaves of positions begin and end: 0 to 512, 512 to 1,024, and so on to the end of the window."""
    edges = [0]
    at = FIRST_OCTAVE
    while at < window:
        edges.append(at)
        at *= 2
    return list(itertools.pairwise([*edges, window]))


def _drift(sums: _Read, reader: int, window: int) -> Drift:
    found = []
    for begin, end in octaves(window):
        blocks = slice(begin // sums.block, end // sums.block)
        loss = sums.loss[..., blocks] / sums.block
        rise = kl = None
        if reader > 0:
            rise = estimate(loss[reader] - loss[0])
            kl = estimate(sums.kl[reader, :, blocks] / sums.block)
        found.append(Octave(begin, end, float(loss[reader].mean()), rise, kl))
    return Drift(sums.loss.shape[1], window, found)
