"""Masks on logits: what a bit forbids is never drawn, and what it allows is drawn as if the rest were not there."""

from dataclasses import replace

import pytest
import torch
from engines import generate
from fake_device import NoWaitingMode

from server.engine import sampler
from server.engine.cache import Allocation
from server.engine.request import Request
from server.engine.sampler import Sampler
from server.wire.messages import Sampling

VOCAB = 77


def requests_of(constrained, **fields):
    """A request for each entry, which says whether it has a grammar: greedy ones and such as draw, in turns."""
    found = []
    for number, held in enumerate(constrained):
        how = Sampling(temperature=number % 3 / 2, top_p=1.0, top_k=0, min_p=0.0, seed=number, **fields)
        message = generate([1, 2], 99, sampling=how, grammar="start: x" if held else "", logprobs=2)
        request = Request(message, arrived=0.0)
        request.allocation = Allocation(number)
        found.append(request)
    return found


def bits(allowed):
    """uint8 `[n, bytes]` of bool `[n, vocab]`, bit by bit."""
    rows, vocab = allowed.shape
    packed = torch.zeros(rows, (vocab + 31) // 32 * 4, dtype=torch.uint8)
    for row, token in allowed.nonzero().tolist():
        packed[row, token // 8] |= 1 << token % 8
    return packed


@pytest.mark.parametrize("piece", [2**24, 3 * VOCAB], ids=["at once", "in pieces of three rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_a_mask_takes_what_it_forbids_out_of_the_logits(monkeypatch, piece, dtype, penalty):
    monkeypatch.setattr(sampler, "PIECE", piece)
    constrained = [True, False, True, True, False, True, True, True]
    generator = torch.Generator().manual_seed(5)
    allowed = torch.rand(len(constrained), VOCAB, generator=generator) < 0.1
    allowed[:, 3] = True
    masked, plain = (Sampler(len(constrained), VOCAB, torch.device("cpu")) for _ in range(2))
    held, free = (requests_of(c, presence_penalty=penalty) for c in (constrained, [False] * len(constrained)))
    masked.start(held)
    plain.start(free)
    masks = bits(allowed[torch.tensor(constrained)])
    for _ in range(6):
        logits = torch.randn(len(constrained), VOCAB, generator=generator).mul(3).to(dtype)
        by_hand = logits.clone()
        for row, is_held in enumerate(constrained):
            if is_held:
                by_hand[row, ~allowed[row]] = float("-inf")
        raw = logits.float().log_softmax(-1)
        with NoWaitingMode():
            sampled = masked.sample(logits, masked.plan(held), masks)
        expected = plain.sample(by_hand, plain.plan(free))
        assert sampled.tokens.equal(expected.tokens)
        assert all(allowed[row, token] for row, token in enumerate(sampled.tokens) if constrained[row])
        assert sampled.logprobs.equal(raw.gather(1, sampled.tokens[:, None])[:, 0]), "the model's own"
        assert sampled.top_logprobs.equal(raw.topk(2).values)


def test_a_plan_lists_the_requests_in_the_order_of_their_masks():
    requests = requests_of([True, False, True])
    plain = Sampler(3, VOCAB, torch.device("cpu"))
    plain.start(requests)
    plan = plain.plan(requests)
    assert plan.constrained == [requests[0], requests[2]]
    assert plain.plan(requests[1:2]).constrained == [] == plain.plan(requests[1:2]).masked
    assert replace(plan, constrained=[]).masked[0].rows.tolist() == [0, 2]
