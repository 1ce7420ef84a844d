"""An engine's process ends when it is told to, whatever its other threads wait for."""

import os
import subprocess
import sys

import msgspec
import pytest
import zmq
from engine_process import START_S, engine_config
from engines import generate

from server.wire.messages import encoder, output_decoder


@pytest.mark.parametrize(("end", "status"), [("stdin", 0), ("crash", 1)])
def test_a_read_that_never_ends_does_not_keep_the_process(checkpoints, tmp_path, end, status):
    os.mkfifo(tmp_path / "state")  # a file that nobody ever writes: to open it takes for ever
    with zmq.Context() as context, context.socket(zmq.PUSH) as inputs, context.socket(zmq.PULL) as outputs:
        inputs.setsockopt(zmq.LINGER, 0)
        outputs.setsockopt(zmq.RCVTIMEO, int(START_S * 1000))
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (inputs, outputs)]
        input_address, output_address = (f"tcp://127.0.0.1:{port}" for port in ports)
        config = engine_config(
            checkpoints["dense"], input_address=input_address, output_address=output_address
        )
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "server.engine.process", msgspec.json.encode(config).decode()],
                stdin=subprocess.PIPE,
                stderr=log,
            )
        try:
            reads = generate([1], 2, state_path=str(tmp_path / "state"))
            inputs.send(encoder.encode(reads))
            while not getattr(output_decoder.decode(outputs.recv()), "running", 0):
                pass  # the engine's sign of life that comes after the read has begun
            if end == "crash":
                inputs.send(b"no message")
            else:
                process.stdin.close()
            assert process.wait(START_S) == status
            assert ("ValidationError" in (tmp_path / "log").read_text()) == (end == "crash")
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
