"""An engine's process ends when it is told to, whatever its other threads wait for."""

import os
import subprocess
import sys

import msgspec
import pytest
import zmq
from engine_process import START_S, engine_config
from engines import generate

from server.wire.messages import encoder, report_decoder


@pytest.mark.parametrize(("end", "status"), [("stdin", 0), ("crash", 1)])
def test_a_read_that_never_ends_does_not_keep_the_process(checkpoints, tmp_path, end, status):
    os.mkfifo(tmp_path / "state")  # a file that nobody ever writes: to open it takes for ever
    with (
        zmq.Context() as context,
        context.socket(zmq.DEALER) as requests,
        context.socket(zmq.PULL) as reports,
    ):
        requests.setsockopt(zmq.LINGER, 0)
        reports.setsockopt(zmq.RCVTIMEO, int(START_S * 1000))
        addresses = {name: f"ipc://{tmp_path}/{name}" for name in ("request_address", "report_address")}
        requests.connect(addresses["request_address"])
        reports.bind(addresses["report_address"])
        config = engine_config(checkpoints["dense"], **addresses)
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "server.engine.process", msgspec.json.encode(config).decode()],
                stdin=subprocess.PIPE,
                stderr=log,
            )
        try:
            reads = generate([1], 2, state_path=str(tmp_path / "state"))
            requests.send(encoder.encode(reads))
            while not getattr(report_decoder.decode(reports.recv()), "running", 0):
                pass  # the engine's sign of life that comes after the read has begun
            if end == "crash":
                requests.send(b"no message")
            else:
                process.stdin.close()
            assert process.wait(START_S) == status
            assert ("ValidationError" in (tmp_path / "log").read_text()) == (end == "crash")
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
