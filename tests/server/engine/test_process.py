"""An engine's process ends when it is told to, whatever its other threads wait for; what it does not begin to load."""

import os
import subprocess
import sys
import weakref
from dataclasses import replace
from unittest.mock import Mock

import msgspec
import pytest
import zmq
from checkpoints import GATED, write_checkpoint
from engine_process import START_S, engine_config
from engines import generate, prompt, run
from fake_device import FakeDevice
from hybrid_cases import CASES, FULL, LINEAR
from hybrids import write_hybrid

from modeling.runtime import TorchRuntime
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.state import StatePool
from server.engine import process
from server.engine.memory import RESERVED
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


def test_what_memory_was_measured_with_is_free_again_when_it_is_planned(tmp_path, monkeypatch):
    pools = []

    class Asked(FakeDevice):
        def free_memory(self) -> int:
            if pools:
                assert pools[0]() is None and self.released == 1
            return super().free_memory()

    class Weak(StatePool):
        def __init__(self, *args, **fields) -> None:
            super().__init__(*args, **fields)
            pools.append(weakref.ref(self))

    monkeypatch.setattr(process, "compile_model", TorchRuntime)
    monkeypatch.setattr(process, "StatePool", Weak)
    device = Asked(total=2 * (RESERVED + 2**28), peak=2**20, logit_rows=64)
    process.build(engine_config(write_checkpoint(tmp_path / "c", GATED), max_requests=2), device)
    assert len(pools) == 2


@pytest.mark.parametrize("kind", ["linear", "softmax", "experts"])
def test_steps_that_wait_for_the_device_are_not_recorded(tmp_path, monkeypatch, kind):
    """Plain torch, where there are no kernels: it serves all kinds of layers, but not all of them by recorded steps."""
    monkeypatch.setattr(process, "compile_model", TorchRuntime)
    if kind == "linear":
        checkpoint = write_checkpoint(tmp_path / "c", GATED)
    else:
        layers = {"softmax": (LINEAR, FULL), "experts": (LINEAR, LINEAR)}[kind]
        case = CASES["text-dense-tied" if kind == "softmax" else "text-moe-fused"]
        checkpoint = write_hybrid(tmp_path / "c", replace(case, layer_types=layers))
    device = FakeDevice(total=2 * (RESERVED + 2**28), peak=2**20, logit_rows=64)
    recorded = Mock(wraps=DecodeGraphs)
    monkeypatch.setattr(process, "DecodeGraphs", recorded)
    engine, ready = process.build(engine_config(checkpoint, max_requests=2), device)
    assert recorded.called == (kind == "linear") and ready.backend == "torch"
    outputs = run(engine, {0: [generate(prompt(5), 3)]})
    assert len([token for output in outputs for token in output.tokens]) == 3
