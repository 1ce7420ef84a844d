"""Whose answers are whose, where an engine has several front ends."""

import pytest
from engines import generate, prompt, score

from server.engine.output import FrontEnds, StepOutput
from server.wire.messages import (
    Abort,
    Failed,
    FrontEndGone,
    Occupancy,
    Pause,
    SaveState,
    Scored,
    StateSaved,
    Token,
    answers_decoder,
)

EMPTY = Occupancy(running=0, waiting=0, used_slots=0)


class Socket:
    """A ROUTER socket that keeps what is sent on it."""

    def __init__(self):
        self.sent = []

    def send_multipart(self, frames):
        front_end, data = frames
        self.sent.append((front_end, answers_decoder.decode(data)))


@pytest.fixture
def fronts():
    return FrontEnds(Socket())


def take(fronts, front_end, *messages):
    return [taken for message in messages for taken in fronts.received(front_end, message)]


def step(**answers):
    empty = {"tokens": [], "scored": []}
    return StepOutput(**{**empty, **answers}, phase="decode", step_s=0.1, batch_size=1, occupancy=EMPTY)


def token(request_id, reason=None):
    return Token(request_id, 7, 1.0, reason)


def test_each_front_end_gets_what_it_asked_for_in_one_message(fronts):
    messages = [generate(prompt(3)) for _ in range(3)]
    ids = [message.request_id for message in messages]
    saving = SaveState(request_id="save", token_ids=[1], path="x", fingerprint={})
    scoring = score(prompt(3))
    assert take(fronts, b"1", messages[0], saving) == [messages[0], saving]
    assert take(fronts, b"2", messages[1], messages[2], scoring) == [messages[1], messages[2], scoring]
    output = step(
        tokens=[token(ids[1]), token(ids[0]), token(ids[2], "stop")],
        scored=[Scored(request_id=scoring.request_id, logprobs=[], kl=[], agree=[])],
        saved=[StateSaved(request_id="save")],
    )
    fronts.answer(output)
    (second, two), (first, one) = fronts._socket.sent
    assert (first, second) == (b"1", b"2")
    assert one.made_at == two.made_at == output.step.made_at < step().made_at
    assert [t.request_id for t in one.tokens] == ids[:1] and one.saved[0].request_id == "save"
    assert [t.request_id for t in two.tokens] == ids[1:] and len(two.scored) == 1
    # Those that have had their last answer are forgotten.
    fronts.answer(
        step(tokens=[token(ids[2])], failed=[Failed(request_id=ids[0], reason="memory", error="x")])
    )
    assert len(fronts._socket.sent) == 3 and fronts._socket.sent[2][1].failed[0].request_id == ids[0]
    assert list(fronts._owners) == [ids[1]]


def test_nothing_is_sent_about_what_was_aborted(fronts):
    message = generate(prompt(3))
    abort = Abort(request_id=message.request_id)
    assert take(fronts, b"1", message, abort) == [message, abort]
    fronts.answer(step(tokens=[token(message.request_id, "stop")]))
    assert not fronts._socket.sent and not fronts._owners


def test_what_a_front_end_had_asked_for_is_aborted_with_it_and_what_comes_late_is_dropped(fronts):
    kept, lost, late = generate(prompt(3)), generate(prompt(4)), generate(prompt(5))
    take(fronts, b"1", kept)
    take(fronts, b"2", lost)
    assert take(fronts, b"hub", FrontEndGone(front_end="2")) == [Abort(request_id=lost.request_id)]
    assert take(fronts, b"2", late, Pause(request_id=late.request_id)) == []
    assert list(fronts._owners) == [kept.request_id]
