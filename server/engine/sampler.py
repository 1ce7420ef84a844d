"""Vectorised sampling whose draws depend on (seed, choice, position) only.

Each draw is one uniform number from a counter-based generator, looked up in the cumulative distribution over token
ids. So a request draws the same tokens whatever it is batched with, and a small change of the logits changes a token
only where the number falls that close to a boundary.

A request's parameters are written into tables on the device, in its slot's row, when it starts. A step then only
indexes them: nothing is built per request.

No number of the host's is assigned to chosen places of a tensor: torch would copy it from memory that may be swapped
out, and wait for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.device import upload
from server.engine.request import Request
from server.engine.sampler_row import SamplerRow
from server.wire.messages import Generate, Sampling

PIECE = 2**24
"""Logits of a piece: to draw from one, in float64 and with filters, takes up to 100 bytes for a while."""

_FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")


def _signed(x: int) -> int:
    """The 64-bit pattern of x as the int64 that torch has."""
    return (x + 2**63) % 2**64 - 2**63


def rows_at_once(vocab: int) -> int:
    """How many rows of logits are adjusted or drawn from at a time."""
    return max(PIECE // vocab, 1)


def _integers(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.long), device)


def _splitmix64(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that passes BigCrush as a counter generator.

    On int64, whose sums and products wrap; shifts are masked because theirs carry the sign.
    """
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))


def stream_key(seeds: Tensor, choices: Tensor) -> Tensor:
    """What a request's draws have in common: int64 `[n]` of its seed and choice, int64 `[n]` each."""
    return _splitmix64(_splitmix64(seeds) ^ choices)


def uniform(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers in [0, 1), float64 `[n]`, each a function of its own key and position (int64 `[n]`)."""
    return ((_splitmix64(keys ^ positions) >> 11) & (2**53 - 1)).double() * 2.0**-53


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set what top-k, then top-p, then min-p exclude to -inf; the most likely token always stays.

    Args:
        logits: `[n, vocab]`, already divided by the temperature.
        top_k: int64 `[n]`, 0 for off.
        top_p, min_p: `[n]`.
    """
    vocab = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)
    drop = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    probs = ordered.masked_fill(drop, float("-inf")).softmax(-1)
    # A token stays when the mass before it is under top_p.
    # 1 is off exactly: rounding may take the mass before the last tokens to 1.
    drop |= (top_p[:, None] < 1) & ((probs.cumsum(-1) - probs) >= top_p[:, None])
    drop |= probs < min_p[:, None] * probs[:, :1]
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), float("-inf"))


def draw(logits: Tensor, temperature: Tensor, u: Tensor, filters: "Filters | None" = None) -> Tensor:
    """One token of each row: logits `[n, vocab]`, temperature and u float64 `[n]` -> int64 `[n]`."""
    scaled = logits.double()
    # The largest is 0 before it is divided: however small the temperature, no infinity meets another.
    scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature[:, None]
    if filters is not None:
        rows = filters.rows
        scaled[rows] = filter_logits(scaled[rows], filters.top_k, filters.top_p, filters.min_p)
    cumulative = scaled.softmax(-1).cumsum(-1)
    # right=True: the first token whose cumulative mass exceeds the target, so never one of zero probability.
    tokens = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    # Beyond the end only where the logits are not numbers; an id outside the vocabulary would end the engine.
    return tokens.clamp(max=logits.shape[-1] - 1)


@dataclass(frozen=True)
class Filters:
    """The drawn rows (int64 `[m]`) that top-k, top-p or min-p narrow, with their parameters `[m]`."""

    rows: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True)
class Drawn:
    """A piece of the rows that are not greedy, int64 `[m]`, with their temperature and the key of their draws."""

    rows: Tensor
    slots: Tensor
    temperature: Tensor
    keys: Tensor
    filters: Filters | None


@dataclass(frozen=True)
class Adjusted:
    """A piece of the rows whose logits are changed before anything is drawn: rows of the batch, and of the tables."""

    rows: Tensor
    slots: Tensor
    table: Tensor


@dataclass(frozen=True)
class Masked:
    """A piece of the rows that a grammar narrows: rows of the batch, int64 `[m]`, and where their masks begin among
    those of the plan."""

    rows: Tensor
    start: int


@dataclass(frozen=True)
class Plan:
    """Which rows of a batch need what. Made once for as long as the batch stays the same.

    `constrained` are the requests that have a grammar, in the batch's order, and so in that of their masks. `reported`
    are the rows that want log-probabilities, `wanted` how many of the most likely tokens each of them asks for, and
    `top` the most of that.
    """

    requests: list[Request]
    slots: Tensor
    drawn: list[Drawn]
    adjusted: list[Adjusted]
    constrained: list[Request]
    masked: list[Masked]
    reported: Tensor | None
    reported_rows: list[int]
    wanted: list[int]
    top: int


@dataclass(frozen=True)
class Sampled:
    """Tokens int64 `[n]`; of the reported rows the token's log-probability `[m]`, and the most likely ones
    `[m, top]`."""

    tokens: Tensor
    logprobs: Tensor | None
    top_logprobs: Tensor | None
    top_ids: Tensor | None


def _filters(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0


def _adjusts(message: Generate) -> bool:
    s = message.sampling
    penalties = s.presence_penalty != 0 or s.frequency_penalty != 0 or s.repetition_penalty != 1
    biases = bool(s.logit_bias) or bool(s.allowed_token_ids)
    return penalties or biases or (_least(message) > 0 and bool(message.stop_token_ids))


def _least(message: Generate) -> int:
    """Before how many tokens the tables keep the stop tokens out. Masks see to that where there is a grammar: what a
    complete grammar allows is to end, however few tokens there are."""
    return 0 if message.grammar else message.min_tokens


class TokenTables:
    """Per request with penalties, biases or a least length, one row over the vocabulary of each kind.

    Few requests have any, and a row is as long as the vocabulary: there are only as many as were ever needed at once.
    """

    def __init__(self, vocab: int, device: torch.device) -> None:
        self._vocab, self._device = vocab, device
        self._row_of_slot: dict[int, int] = {}
        self._free: list[int] = []
        self.counts = self._empty(torch.int32)
        """How often a token was generated, `[rows, vocab]`."""
        self.seen = self._empty(torch.bool)
        """Whether a token is in the prompt or was generated, `[rows, vocab]`."""
        self.stops = self._empty(torch.bool)
        """Whether a token ends the request, `[rows, vocab]`."""
        self.bias = self._empty(torch.float32)
        """What is added to a token's logit, -inf where it may not be drawn, `[rows, vocab]`."""

    def _empty(self, dtype: torch.dtype, rows: int = 0) -> Tensor:
        return torch.zeros(rows, self._vocab, dtype=dtype, device=self._device)

    def row(self, slot: int) -> int:
        return self._row_of_slot[slot]

    def release(self, slot: int) -> None:
        """Free the row of a slot's last request: the slot has another one now."""
        if slot in self._row_of_slot:
            self._free.append(self._row_of_slot.pop(slot))

    def start(self, slot: int, message: Generate) -> None:
        """Give the request in `slot` a row and fill it."""
        row = self._take(slot)
        for table in self._all:
            table[row].zero_()
        self.seen[row].index_fill_(0, _integers(message.token_ids, self._device), True)
        # Ids that the model does not have can't be drawn anyway.
        stops = [t for t in message.stop_token_ids if 0 <= t < self._vocab]
        self.stops[row].index_fill_(0, _integers(stops, self._device), True)
        if message.sampling.allowed_token_ids:
            self.bias[row].fill_(float("-inf"))
            allowed = _integers(message.sampling.allowed_token_ids, self._device)
            self.bias[row].index_fill_(0, allowed, 0)
        bias = {t: x for t, x in message.sampling.logit_bias.items() if 0 <= t < self._vocab}
        values = torch.tensor(list(bias.values()), dtype=torch.float32)
        self.bias[row, _integers(list(bias), self._device)] += upload(values, self._device)

    def save(self, slot: int) -> list[Tensor] | None:
        """A copy of the slot's row of each kind; None if it has none."""
        row = self._row_of_slot.get(slot)
        return None if row is None else [table[row].clone() for table in self._all]

    def load(self, slot: int, saved: list[Tensor]) -> None:
        """Give the request in `slot` a row, filled as `save` found that of another slot."""
        row = self._take(slot)
        for table, values in zip(self._all, saved, strict=True):
            table[row] = values

    @property
    def _all(self) -> tuple[Tensor, ...]:
        return self.counts, self.seen, self.stops, self.bias

    def _take(self, slot: int) -> int:
        if not self._free:
            self._grow()
        row = self._row_of_slot[slot] = self._free.pop()
        return row

    def _grow(self) -> None:
        rows = len(self.counts)
        more = max(rows, 4)
        for name in ("counts", "seen", "stops", "bias"):
            table: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([table, self._empty(table.dtype, more)]))
        self._free += range(rows, rows + more)


class Sampler:
    """The sampling parameters of all slots, and draws made with them.

    Args:
        slots: of the state pool.
        vocab: token ids are below this.
    """

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self._vocab, self._device = vocab, device
        self._floats = torch.zeros(slots, len(_FLOATS), dtype=torch.float64, device=device)
        self._top_k = torch.zeros(slots, dtype=torch.long, device=device)
        self._keys = torch.zeros(slots, dtype=torch.long, device=device)
        self._min_tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._positions = torch.zeros(slots, dtype=torch.long, device=device)
        """Index of the token that each slot samples next."""
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._bits = upload(torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8), device)
        self._tables = TokenTables(vocab, device)

    def start(self, requests: list[Request]) -> None:
        """Take in the parameters of requests that sample their first token next."""
        messages = [r.message for r in requests if isinstance(r.message, Generate)]
        if not messages:
            return
        rows = [m.sampling for m in messages]
        slots = _integers([r.slot for r in requests], self._device)
        floats = [[getattr(row, name) for name in _FLOATS] for row in rows]
        ints = _integers(
            [
                [min(row.top_k, self._vocab) for row in rows],
                [_signed(row.seed) for row in rows],
                [row.choice for row in rows],
                [_least(m) for m in messages],
            ],
            self._device,
        )
        self._floats[slots] = upload(torch.tensor(floats, dtype=torch.float64), self._device)
        self._top_k[slots] = ints[0]
        self._keys[slots] = stream_key(ints[1], ints[2])
        self._min_tokens[slots] = ints[3]
        self._positions.index_fill_(0, slots, 0)
        for request, message in zip(requests, messages, strict=True):
            self._tables.release(request.slot)
            if _adjusts(message):
                self._tables.start(request.slot, message)

    @property
    def _parameters(self) -> tuple[Tensor, ...]:
        return self._floats, self._top_k, self._keys, self._min_tokens, self._positions

    def save(self, slot: int, last_token: Tensor) -> SamplerRow:
        """A copy of what there is of the request in `slot`, whose last token was `last_token`."""
        return SamplerRow([t[slot].clone() for t in self._parameters], self._tables.save(slot), last_token)

    def load(self, slot: int, saved: SamplerRow) -> None:
        """Go on, in another slot, with a request that `save` was called for."""
        for t, value in zip(self._parameters, saved.parameters, strict=True):
            t[slot] = value
        self._tables.release(slot)
        if saved.tokens is not None:
            self._tables.load(slot, saved.tokens)

    def plan(self, requests: list[Request]) -> Plan:
        """What the rows of a batch need. The requests have started."""
        messages = [r.message for r in requests if isinstance(r.message, Generate)]
        slots = _integers([r.slot for r in requests], self._device)
        drawn = [i for i, m in enumerate(messages) if m.sampling.temperature > 0]
        adjusted = [i for i, m in enumerate(messages) if _adjusts(m)]
        constrained = [i for i, m in enumerate(messages) if m.grammar]
        reported = [i for i, m in enumerate(messages) if m.logprobs is not None]
        wanted = [messages[i].logprobs or 0 for i in reported]
        return Plan(
            requests=requests,
            slots=slots,
            drawn=[self._plan_drawn(slots, messages, piece) for piece in self._pieces(drawn)],
            adjusted=[self._plan_adjusted(slots, requests, piece) for piece in self._pieces(adjusted)],
            constrained=[requests[i] for i in constrained],
            masked=self._plan_masked(constrained),
            reported=_integers(reported, self._device) if reported else None,
            reported_rows=reported,
            wanted=wanted,
            top=min(max(wanted, default=0), self._vocab),
        )

    def _pieces(self, rows: list[int]) -> list[list[int]]:
        size = rows_at_once(self._vocab)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _plan_drawn(self, slots: Tensor, messages: list[Generate], drawn: list[int]) -> Drawn:
        rows = _integers(drawn, self._device)
        at = slots[rows]
        floats = self._floats[at]
        filters = None
        filtered = [n for n, i in enumerate(drawn) if _filters(messages[i].sampling)]
        if filtered:
            which = _integers(filtered, self._device)
            narrow = floats[which]
            filters = Filters(which, self._top_k[at[which]], narrow[:, 1], narrow[:, 2])
        return Drawn(rows, at, floats[:, 0], self._keys[at], filters)

    def _plan_adjusted(self, slots: Tensor, requests: list[Request], adjusted: list[int]) -> Adjusted:
        rows = _integers(adjusted, self._device)
        table = _integers([self._tables.row(requests[i].slot) for i in adjusted], self._device)
        return Adjusted(rows, slots[rows], table)

    def _plan_masked(self, constrained: list[int]) -> list[Masked]:
        masked: list[Masked] = []
        for piece in self._pieces(constrained):
            start = masked[-1].start + len(masked[-1].rows) if masked else 0
            masked.append(Masked(_integers(piece, self._device), start))
        return masked

    def sample(self, logits: Tensor, plan: Plan, masks: Tensor | None = None) -> Sampled:
        """The next token of each row of logits `[n, vocab]`, which may be written to; moves each slot's position on.

        The logits are widened only where something is computed of them: a pass over a large vocabulary takes as long as
        a layer.

        Args:
            masks: which tokens the plan's constrained requests may have, uint8 `[m, bytes]` on the device: token i is
                bit i % 8 of byte i // 8.
        """
        raw = None if plan.reported is None else logits[plan.reported].float().log_softmax(-1)
        if plan.adjusted:
            logits = logits.to(torch.float32, copy=True)
        for a in plan.adjusted:
            logits.index_copy_(0, a.rows, self._adjusted(logits, a))
        for m in plan.masked:
            assert masks is not None
            own = masks[m.start : m.start + len(m.rows)]
            forbidden = ((own[:, :, None] & self._bits) == 0).flatten(1)[:, : self._vocab]
            if len(plan.constrained) == len(plan.requests):  # no copy of the rows
                logits[m.start : m.start + len(m.rows)].masked_fill_(forbidden, float("-inf"))
            else:
                logits.index_copy_(0, m.rows, logits[m.rows].masked_fill_(forbidden, float("-inf")))
        tokens = logits.argmax(-1)
        for d in plan.drawn:
            u = uniform(d.keys, self._positions[d.slots])
            tokens[d.rows] = draw(logits[d.rows], d.temperature, u, d.filters)
        self._positions[plan.slots] += 1
        for a in plan.adjusted:
            new = tokens[a.rows]
            self._tables.counts[a.table, new] += 1
            self._tables.seen[a.table, new] = self._true
        if raw is None or plan.reported is None:
            return Sampled(tokens, None, None, None)
        own = raw.gather(1, tokens[plan.reported][:, None]).squeeze(1)
        top = raw.topk(plan.top, dim=-1) if plan.top else None
        return Sampled(tokens, own, None if top is None else top.values, None if top is None else top.indices)

    def _adjusted(self, logits: Tensor, a: Adjusted) -> Tensor:
        """The rows of a piece with biases, then no end before the least length, then penalties, in vLLM's order."""
        tables = self._tables
        presence, frequency, repetition = self._floats[a.slots, 3:].float()[..., None].unbind(1)
        x = logits[a.rows] + tables.bias[a.table]
        too_early = (self._positions[a.slots] < self._min_tokens[a.slots])[:, None]
        x = x.masked_fill(tables.stops[a.table] & too_early, float("-inf"))
        x = torch.where(tables.seen[a.table], torch.where(x > 0, x / repetition, x * repetition), x)
        counts = tables.counts[a.table]
        return x - frequency * counts - presence * (counts > 0)
