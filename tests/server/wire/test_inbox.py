"""Messages of a socket as they come."""

import asyncio

import pytest
import zmq
from engine_process import until

from server.wire.inbox import AT_ONCE, Inbox


@pytest.fixture
def pair(tmp_path):
    with zmq.Context() as context:
        ends = [context.socket(zmq.PAIR) for _ in range(2)]
        for end in ends:
            end.set_hwm(0)
        ends[0].bind(f"ipc://{tmp_path}/pair")
        ends[1].connect(f"ipc://{tmp_path}/pair")
        yield ends
        for end in ends:
            end.close(linger=0)


def test_every_message_is_taken_though_one_of_them_can_not_be(pair, caplog):
    ours, theirs = pair
    taken, rounds = [], []

    def take(data):
        taken.append(int(data))
        if int(data) == 3:
            raise ValueError("no message")

    async def work():
        inbox = Inbox(ours, take, lambda: rounds.append(len(taken)))
        for number in range(3 * AT_ONCE):
            theirs.send(b"%d" % number)
        await until(lambda: len(taken) == 3 * AT_ONCE)
        theirs.send(b"1000")
        await until(lambda: taken[-1] == 1000)
        inbox.close()
        inbox.send(b"nobody hears it")

    asyncio.run(work())
    assert taken == [*range(3 * AT_ONCE), 1000] and "no message" in caplog.text
    assert max(b - a for a, b in zip([0, *rounds], rounds, strict=False)) <= AT_ONCE


def test_what_comes_while_we_send_is_taken(pair):
    ours, theirs = pair
    taken = []

    async def work():
        inbox = Inbox(ours, taken.append)
        theirs.send(b"connected")  # before that, a socket that was bound has nobody to send to
        await until(lambda: bool(taken))
        taken.clear()
        for number in range(2000):
            theirs.send(b"%d" % number)
            inbox.send(b"x")
            if number % 7 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(taken) == 2000)
        inbox.close()

    asyncio.run(work())
    assert taken == [b"%d" % number for number in range(2000)]
