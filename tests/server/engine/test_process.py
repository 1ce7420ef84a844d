"""An engine's process ends when it is told to, whatever its other threads wait for; what it does not begin to load."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest
import zmq
from engine_process import START_S, engine_config
from engines import generate
from hybrid_cases import CASES, LINEAR
from hybrids import write_hybrid

from modeling.checkpoint import CheckpointError, open_checkpoint
from server.engine.process import check_served
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


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (CASES["text-dense-tied"], "(qwen3_5_text) has softmax attention in 2 layers of 8 (3, 7)"),
        (
            replace(CASES["text-moe-fused"], layer_types=(LINEAR, LINEAR)),
            "(qwen3_5_moe_text) has experts in 2 layers of 2 (0, 1)",
        ),
    ],
    ids=["softmax", "experts"],
)
def test_a_hybrid_is_refused_on_a_gpu_and_not_on_a_cpu(tmp_path, case, reason):
    checkpoint = open_checkpoint(write_hybrid(tmp_path / "hybrid", case))
    check_served(checkpoint, "cpu")
    with pytest.raises(CheckpointError, match=re.escape(reason) + ".* set device to cpu"):
        check_served(checkpoint, "cuda:0")
