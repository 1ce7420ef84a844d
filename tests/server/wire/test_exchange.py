"""What waits for the reader of one request, and what the engine is told of it."""

import asyncio

import pytest

from server.wire.exchange import (
    MOST_TAKEN,
    TOKEN_BYTES,
    TOP_GROWTH,
    BrokenOutputError,
    EngineUnavailableError,
    Exchange,
)
from server.wire.messages import Abort, Pause, Resume, Token

HELD = 50
"""Tokens that may wait."""


def exchange(told, most_unread=HELD * TOKEN_BYTES):
    def finished():
        told.append("finished")

    def closed(exchange):
        told.append("closed")

    return Exchange("a", "dense", lambda: None, most_unread, told.append, finished, closed)


def token(number, reason=None, alternatives=0):
    top = bytes(TOKEN_BYTES * alternatives // TOP_GROWTH) if alternatives else None
    return Token("a", number, float(number), reason, top=top)


@pytest.mark.parametrize(("alternatives", "held"), [(0, HELD), (1, HELD // 2), (2, HELD // 3)])
def test_so_many_tokens_wait_for_a_reader_and_no_more(alternatives, held):
    told = []
    e = exchange(told)
    for number in range(held):
        e.put(token(number, alternatives=alternatives))
    assert not told
    e.put(token(held, alternatives=alternatives))
    e.put(token(held + 1, alternatives=alternatives))  # of a step that had been launched
    assert told == [Pause(request_id="a")]
    assert [t.token_id for t in e.take()] == list(range(held + 2))
    assert told == [Pause(request_id="a"), Resume(request_id="a")]
    assert e.take() == []
    e.put(token(held + 2, "length", alternatives))
    assert [t.token_id for t in e.take()] == [held + 2]
    e.close()
    assert told[2:] == ["finished", "closed"] and e.error is None


def test_a_request_that_is_done_is_neither_paused_nor_resumed():
    told = []
    e = exchange(told)
    for number in range(HELD):
        e.put(token(number))
    e.put(token(HELD, "stop"))
    e.lose()  # the engine dies: this request has all that it wants
    assert told == ["finished"] and e.error is None
    assert len(e.take()) == HELD + 1


@pytest.mark.parametrize("paused", [False, True])
def test_what_came_before_an_error_is_there_to_be_taken(paused):
    told = []
    e = exchange(told, 0 if paused else HELD * TOKEN_BYTES)
    e.put(token(0))
    e.put(token(-1, "error"))
    assert [t.token_id for t in e.take()] == [0]
    assert isinstance(e.error, BrokenOutputError)
    e.close()
    e.close()
    assert told == [Pause(request_id="a")] * paused + ["finished", "closed"]


def test_very_many_are_taken_in_parts_and_an_error_comes_after_the_last():
    async def work():
        woken, told = [], []
        e = Exchange("a", "dense", lambda: woken.append(True), 0, told.append, lambda: None, lambda _: None)
        for number in range(2 * MOST_TAKEN + 1):
            e.put(token(number))
        taken = []
        for left in (True, True, False):
            woken.clear()
            part = e.take()
            taken += part
            await asyncio.sleep(0)
            assert len(part) <= MOST_TAKEN and woken == [True] * left and e.error is None
            assert told == [Pause(request_id="a")] + [Resume(request_id="a")] * (not left)
        assert [t.token_id for t in taken] == list(range(2 * MOST_TAKEN + 1))
        for number in range(MOST_TAKEN + 1):
            e.put(token(number))
        e.lose()
        assert len(e.take()) == MOST_TAKEN and e.error is None
        assert len(e.take()) == 1 and isinstance(e.error, EngineUnavailableError)

    asyncio.run(work())


def test_closing_early_has_the_engine_forget_the_request():
    told = []
    e = exchange(told)
    e.put(token(0))
    e.close()
    assert told == ["closed", Abort(request_id="a"), "finished"]
