"""The limit on a request's time in all."""

import asyncio

import pytest

from server.api.http.middleware import Limits


@pytest.mark.parametrize("complete", [False, True])
def test_an_answer_that_is_complete_when_the_time_is_up_gets_nothing_more(complete):
    sent = []

    async def stream(scope, receive, send):
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": not complete})
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    limits = Limits(stream, max_body_bytes=10, larger={}, body_timeout_s=240, request_timeout_s=0.01)
    asyncio.run(limits({"type": "http", "path": "/", "headers": []}, None, send))
    assert len(sent) == (2 if complete else 3)
    assert not sent[-1].get("more_body")
    assert complete or b"504" in sent[-1]["body"]
