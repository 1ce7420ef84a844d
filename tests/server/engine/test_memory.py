"""What a variant's memory goes to, on a device that says what it has; and what is said when it does not suffice."""

import asyncio
import itertools
import logging
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import pytest
import torch
from checkpoints import GATED, write_checkpoint
from engine_process import engine_config, generated, until
from engines import Bench, generate, prompt, run, score, tokens_of
from fake_device import FakeDevice
from hybrid_cases import CASES
from hybrids import write_hybrid

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime
from modeling.spec import StateTypes
from modeling.state import StatePool
from server.api.http.errors import from_engine
from server.engine import process
from server.engine.device import HOST
from server.engine.memory import (
    GRAPH_BYTES,
    RESERVED,
    DoesNotFitError,
    Needs,
    check_weights,
    measure,
    plan_memory,
)
from server.engine.process import build
from server.settings import ConfigurationError, Settings, device_shares, load_settings
from server.single import create_server
from server.wire.client import EngineClient
from server.wire.exchange import EngineUnavailableError, OutOfMemoryError, StateError
from server.wire.messages import CANNOT_LOAD, Answers, Failed, SaveState, encoder

SLOT = 1000


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", GATED)


def plan(device, needs=Needs(0), sharing=1, **fields):  # noqa: B008 (frozen)
    return plan_memory(engine_config("x", **fields), device, needs, SLOT, 0, sharing)


def test_on_a_cpu_the_pool_is_as_large_as_its_memory(monkeypatch):
    monkeypatch.setattr("server.engine.device.host_memory", lambda: 1_000_000)
    assert plan(HOST, max_requests=None).slots == 64
    assert plan(HOST, max_requests=7).slots == 7
    # One of those that fit is the null slot.
    assert plan(HOST, max_requests=7, state_memory=20_999).slots == 19
    assert plan(HOST, max_requests=None, state_memory=0.5).slots == 499
    for memory in (1999, 1e-3, 2):
        with pytest.raises(DoesNotFitError, match="2,000 bytes"):
            plan(HOST, state_memory=memory)


def test_on_a_gpu_slots_are_what_weights_work_and_graphs_leave_of_the_share():
    device, needs = FakeDevice(total=1_000_000), Needs(100_000, 50_000, 20_000, 30_000)
    device.others = 150_000  # its own weights, and a neighbour
    assert plan(device, needs, device_memory=0.5).slots == 299
    assert plan(device, needs, device_memory=0.5, max_requests=3).slots == 299, "the others hold prefixes"
    assert plan(device, needs, device_memory=0.5, state_memory=0.5).slots == 149
    assert plan(device, needs, device_memory=0.5, state_memory=40_000).slots == 39
    made = plan(device, needs, device_memory=0.5)
    assert sum(made.parts.values()) == 500_000 and made.states == 300 * SLOT
    text = str(made)
    assert "memory on cuda:0, of 500,000 bytes" in text
    for name, size in (("weights", "100,000"), ("states", "300,000"), ("total", "500,000")):
        assert any(line.split()[:2] == [name, size] for line in text.splitlines()), name


def test_what_does_not_fit_is_refused_with_the_numbers():
    device, needs = FakeDevice(total=1_000_000), Needs(100_000, 50_000, 20_000, 30_000)
    with pytest.raises(DoesNotFitError, match="1,000 bytes are left for states.*2,000 bytes") as error:
        plan(device, needs, device_memory=0.201)
    for number in ("100,000", "50,000", "20,000", "30,000", "201,000", "0.201"):
        assert number in str(error.value)
    with pytest.raises(DoesNotFitError, match="450,?000 bytes, and 300,000 are left"):
        plan(device, needs, device_memory=0.5, state_memory=450_000)
    # Somebody else has more of the card than the shares leave him.
    device.others = 700_000
    with pytest.raises(DoesNotFitError, match="300 slots|299 slots") as error:
        plan(device, needs, device_memory=0.5)
    assert "230,000 are left" in str(error.value)
    device.others = 0
    check_weights(engine_config("x", device_memory=0.5), device, 500_000)
    with pytest.raises(DoesNotFitError, match="weights alone are 500,001 bytes; of the 1,000,000"):
        check_weights(engine_config("x", device_memory=0.5), device, 500_001)
    device.others = 600_000
    with pytest.raises(DoesNotFitError, match="400,000 are free"):
        check_weights(engine_config("x", device_memory=0.5), device, 450_000)


def refused(device, needs=Needs(0), **fields):  # noqa: B008 (frozen)
    """What is said, without the table."""
    with pytest.raises(DoesNotFitError) as error:
        plan(device, needs, **fields)
    return str(error.value).splitlines()[0]


def test_a_cpu_gives_no_more_than_it_has(monkeypatch):
    monkeypatch.setattr("server.engine.device.host_memory", lambda: 100_000)
    fits = [dict(max_requests=99), dict(state_memory=100_000), dict(sharing=2, state_memory=50_000)]
    for fields in (*fits, dict(state_memory=0.99), dict(sharing=2, state_memory=0.5)):
        plan(HOST, **{"max_requests": None, **fields})
    assert refused(HOST, state_memory=200_000) == (
        "199 slots are 200,000 bytes, and 100,000 are left for them; set state_memory to 100,000 bytes at most"
    )
    assert refused(HOST, max_requests=150) == (
        "150 slots are 151,000 bytes, and 100,000 are left for them; set state_memory to 100,000 bytes at most, or "
        "lower max_requests"
    )
    two = "50,000 are left for them (100,000 bytes are free, for 2 variants)"
    assert refused(HOST, state_memory=60_000, sharing=2) == (
        f"59 slots are 60,000 bytes, and {two}; set state_memory to 50,000 bytes at most"
    )
    assert refused(HOST, state_memory=0.9, sharing=2) == (
        f"89 slots are 90,000 bytes, and {two}; set state_memory to 0.5 at most"
    )
    with pytest.raises(DoesNotFitError, match="weights alone are 100,001 bytes, and 100,000 are free"):
        check_weights(engine_config("x"), HOST, 100_001)
    check_weights(engine_config("x"), HOST, 100_000)


def test_each_refusal_advises_what_helps(monkeypatch):
    """Up where there is too little, down where too much is asked, to others where they have it."""
    monkeypatch.setattr("server.engine.device.host_memory", lambda: 1_000_000)
    assert refused(HOST, state_memory=1500) == (
        "state_memory=1500 is 1,500 bytes, and two states of this model, the least that a pool can have, are "
        "2,000 bytes; raise state_memory to 2,000 bytes at least"
    )
    assert refused(HOST, state_memory=1e-3).endswith("; raise state_memory to 0.00202 at least")
    monkeypatch.setattr("server.engine.device.host_memory", lambda: 1500)
    for memory in (1400, 0.5):
        assert refused(HOST, state_memory=memory).endswith(
            "; free some memory of this machine, or serve fewer or smaller models"
        )
    device, needs = FakeDevice(total=1_000_000), Needs(100_000, 50_000, 20_000, 30_000)
    more, others = (
        "raise device_memory (now 0.5)",
        "free some memory of cuda:0: others hold what device_memory=0.5",
    )
    assert "raise state_memory to 2,000 bytes" in refused(device, needs, device_memory=0.5, state_memory=1024)
    assert "raise state_memory to 0.00673 at" in refused(device, needs, device_memory=0.5, state_memory=0.001)
    for memory in (1024, 0.5, None):
        assert refused(device, needs, device_memory=0.201, state_memory=memory).endswith(
            "; raise device_memory (now 0.201)"
        )
    assert refused(device, needs, device_memory=0.5, state_memory=450_000).endswith(
        f"; lower state_memory to 300,000 bytes at most, or {more}"
    )
    device.others = 700_000
    assert others in refused(device, needs, device_memory=0.5)
    assert "raise" not in refused(device, needs, device_memory=0.5)
    assert "lower state_memory to 230,000 bytes" in refused(
        device, needs, device_memory=0.5, state_memory=290_000
    )
    for others_have, mention in ((0, more), (600_000, others)):
        device.others = others_have
        with pytest.raises(DoesNotFitError) as error:
            check_weights(engine_config("x", device_memory=0.5), device, 500_001)
        assert mention in str(error.value)


def test_variants_that_load_together_share_the_cpu():
    both = dict(devices=["cpu", "cpu", "cuda:1"])
    assert process.sharing(engine_config("x", **both)) == 2
    assert process.sharing(engine_config("x")) == 1
    assert process.sharing(engine_config("x", devices=["auto", "cpu"])) == (
        1 if torch.cuda.is_available() else 2
    )


def test_more_memory_than_there_is_ends_the_server_with_the_numbers(checkpoints, tmp_path):
    arguments = [f"dense={checkpoints['dense']}", "--device", "cpu", "--port", "0"]
    done = subprocess.run(
        [Path(sys.executable).parent / "lowkey-serve", *arguments, "--state-memory", "100TiB"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    *_, reason = re.findall(r"variant 'dense' could not be loaded: (.*)", done.stderr)
    assert re.search(
        r"slots( and [\d,]+ pages)? are 109,951,162,\d{3},\d{3} bytes, and [\d,]+ are left", reason
    ), reason
    assert re.search(r"set state_memory to [\d,]+ bytes at most", reason)


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_an_engine_on_a_gpu_fills_its_share_and_says_with_what(bench, caplog, state_dtype):
    types = StateTypes.named(state_dtype, torch.bfloat16)
    per_slot = bench.model.spec.state_bytes(0, types)
    weights = sum(p.nbytes for p in bench.checkpoint.load(dtype=torch.bfloat16).parameters())
    device = FakeDevice(total=2 * (RESERVED + 2**28), peak=2**20, logit_rows=64)
    options = dict(dtype="auto", max_requests=5, device_memory=0.5, state_dtype=state_dtype)
    config = engine_config(bench.checkpoint.path, **options)
    with caplog.at_level(logging.INFO):
        engine, ready = build(config, device)
    graphs = 2**20 + 4 * GRAPH_BYTES  # 1, 2, 4 and 5 requests
    assert ready.memory["weights"] == ready.weights_bytes == weights
    assert (ready.memory["graphs"], ready.memory["workspace"]) == (graphs, 2**20)
    assert ready.slots == (2**28 - weights - graphs - 2**20) // per_slot - 1
    assert ready.memory["states"] == (ready.slots + 1) * per_slot
    assert ready.max_running == 5 and ready.device == "cuda:0"
    assert device.recorded.sizes == [5, 4, 2, 1]
    assert "memory on cuda:0" in caplog.text and f"{weights:,} bytes" in caplog.text
    assert engine._depth == 1
    # It runs, and in bfloat16 as a GPU's model does.
    messages = [generate(prompt(n, seed=n), 6) for n in (5, 70)]
    tokens = tokens_of(run(engine, {0: messages}))
    assert [len(tokens[m.request_id]) for m in messages] == [6, 6]
    assert ("replay", 2) in device.events


def test_no_more_graphs_than_slots(bench):
    per_slot = bench.model.spec.state_bytes(0, StateTypes(inputs=torch.bfloat16))
    device = FakeDevice(total=2**40)
    config = engine_config(bench.checkpoint.path, dtype="auto", max_requests=None, state_memory=4 * per_slot)
    _, ready = build(config, device)
    assert ready.slots == 3 and device.recorded.sizes == [3, 2, 1]


def test_batch_invariant_steps_are_not_recorded(bench):
    device = FakeDevice(total=2**40)
    config = engine_config(bench.checkpoint.path, state_memory=2**22, batch_invariant=True)
    engine, ready = build(config, device)
    assert device.recorded is None and ready.memory["graphs"] == 0
    message = generate(prompt(20), 5)
    assert bench.check_tokens(message, tokens_of(run(engine, {0: [message]}))[message.request_id])


def refuse(config, device=None):
    raise DoesNotFitError("the weights alone are 5 bytes")


def overflow(config, device=None):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB, of which 3.00 GiB is free."
    )


@pytest.mark.parametrize(("fails", "number"), [(refuse, "5 bytes"), (overflow, "20.00 GiB")])
def test_an_engine_that_does_not_fit_ends_with_the_code_that_is_not_tried_again(
    monkeypatch, caplog, fails, number
):
    monkeypatch.setattr(process, "build", fails)
    monkeypatch.setattr(process.zmq, "Context", MagicMock)
    with pytest.raises(SystemExit) as end:
        process.serve(engine_config("x", variant="big"))
    assert end.value.code == CANNOT_LOAD
    assert "big: cannot load x" in caplog.text and number in caplog.text


@pytest.fixture
def nowhere(tmp_path):
    """A client of an engine that never answers."""

    async def made():
        client = EngineClient("dense", "0")
        client.engine_up(None, f"ipc://{tmp_path}/nobody")
        return client

    return made


@pytest.mark.parametrize(("reason", "kind"), [("memory", OutOfMemoryError), ("state", StateError)])
@pytest.mark.parametrize("what", ["generate", "score", "save"])
def test_a_failed_request_is_an_error_of_its_kind(nowhere, reason, kind, what):
    async def work():
        client = await nowhere()
        message = generate(prompt(5))
        if what == "generate":
            items = generated(client, message)
            task = asyncio.ensure_future(anext(items))
        elif what == "score":
            message = score(prompt(5))
            task = asyncio.ensure_future(client.score(message))
        else:
            message = SaveState(request_id="s", token_ids=[1], path="x", fingerprint={})
            task = asyncio.ensure_future(client.save_state(message))
        await until(lambda: bool(client._requests))
        failed = Failed(request_id=message.request_id, reason=reason, error="why")
        client._deliver(encoder.encode(Answers(made_at=0.0, failed=[failed])))
        client._wake()
        with pytest.raises(kind, match="why"):
            await task
        assert not client._requests
        client.engine_down()

    asyncio.run(work())


def test_out_of_memory_is_503_with_retry_after():
    error = from_engine(OutOfMemoryError("no memory left for this request"))
    assert isinstance(OutOfMemoryError(""), EngineUnavailableError)
    assert error.status == 503 and "retry-after" in error.headers and "no memory left" in error.message


def shares(device="auto", device_memory=0.9, **variants):
    made = {name: {"source": "org/x", **fields} for name, fields in variants.items()}
    return device_shares(Settings(variants=made, device=device, device_memory=device_memory))


def test_variants_of_one_card_share_it():
    assert shares(a={}) == {"a": 0.9}
    assert shares(a={}, b={}) == {"a": 0.45, "b": 0.45}
    assert shares(a={"device_memory": 0.6}, b={}) == {"a": 0.6, "b": pytest.approx(0.3)}
    assert shares(a={"device_memory": 0.6}, b={"device_memory": 0.4}) == {"a": 0.6, "b": 0.4}
    # auto and cuda are the first card; each card has a whole.
    both = {"a": {"device": "cuda:0"}, "b": {"device": "cuda:1"}, "c": {"device": "cuda"}}
    assert shares(**both) == {"a": 0.45, "b": 0.9, "c": 0.45}
    assert shares(device="cuda:1", a={"device_memory": 1.0}, b={"device": "cuda:0", "device_memory": 1.0})
    assert shares(device="cpu", a={}, b={}) == {"a": 1.0, "b": 1.0}
    assert shares(a={"device": "cpu"}, b={}) == {"a": 1.0, "b": 0.9}


@pytest.mark.parametrize(
    ("variants", "mention"),
    [
        ({"a": 0.7, "b": 0.4}, "cuda:0 .*'a': 0.7, 'b': 0.4.* come to 1.1, more than 1"),
        ({"a": 0.95, "b": None}, "'a': 0.95.* leave nothing of device_memory = 0.9 for .'b'."),
    ],
)
def test_more_than_there_is_is_an_error_that_names_the_variants(tmp_path, variants, mention):
    file = tmp_path / "lowkey.toml"
    lines = []
    for name, share in variants.items():
        lines += [f"[variants.{name}]", 'source = "org/x"']
        lines += [] if share is None else [f"device_memory = {share}"]
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigurationError, match=mention):
        load_settings(file)


def test_what_compiling_leaves_behind_is_not_measured(bench, monkeypatch):
    """Where launches only compile, states are what happened to be in memory: sampling from them would fail."""
    pool = StatePool(bench.model.spec, 1)
    done: list[str] = []

    def only_compiles(self, work):
        done.append("compiled")
        work()
        for layer in pool.layers:
            for tensor in layer.tensors(pool.null_slot, 0).values():
                tensor.fill_(torch.nan)

    class Measuring(FakeDevice):
        def peak_memory(self, work) -> int:
            states = [t for layer in pool.layers for t in layer.tensors(pool.null_slot, 0).values()]
            assert done == ["compiled"] and all(bool(t.isfinite().all()) for t in states)
            return super().peak_memory(work)

    monkeypatch.setattr(TorchRuntime, "compile_ahead", only_compiles)
    device = Measuring(peak=2**20, logit_rows=64)
    needs = measure(engine_config("x"), TorchRuntime(bench.model), pool, device, 7, 16, [1, 2])
    assert needs == Needs(7, 2**20, 2**20 + 2 * GRAPH_BYTES, RESERVED)


@pytest.mark.parametrize(("tokens", "sizes"), [(100, [1, 2]), (64, [])])
def test_kernels_of_short_prompts_are_compiled_ahead_too(bench, tokens, sizes):
    """Which kernels a prompt takes depends on its length: by factors of 2, and one token has kernels of its own."""
    lengths: set[int] = set()

    class Compiles(TorchRuntime):
        compiling = False

        def compile_ahead(self, work):
            self.compiling = True
            work()
            self.compiling = False

        def prefill(self, input_ids, cu_seqlens, pool, slots):
            if self.compiling:
                lengths.add(len(input_ids))
            return super().prefill(input_ids, cu_seqlens, pool, slots)

    pool = StatePool(bench.model.spec, 1)
    device = FakeDevice(peak=2**20, logit_rows=64)
    measure(engine_config("x"), Compiles(bench.model), pool, device, 7, tokens, sizes)
    assert 1 in lengths
    assert all(any(n <= length <= 2 * n for length in lengths) for n in range(1, tokens + 1))


@pytest.mark.parametrize("most", [1, None])
def test_a_context_may_be_shorter_than_a_step(tmp_path, most):
    """No prompt that is measured is longer than a request may be."""
    model = open_checkpoint(str(write_hybrid(tmp_path / "c", CASES["text-dense-tied"]))).load()
    pool = StatePool(model.spec, 1, pages=8, max_tokens=100)
    device = FakeDevice(peak=2**20, logit_rows=128)
    measured = []

    class Runtime(TorchRuntime):
        def prefill(self, input_ids, cu_seqlens, pool, slots):
            measured.append((len(input_ids), max(b - a for a, b in itertools.pairwise(cu_seqlens))))
            return super().prefill(input_ids, cu_seqlens, pool, slots)

    needs = measure(engine_config("x", max_requests=most), Runtime(model), pool, device, 7, 256, [])
    assert needs == Needs(7, 2**20, 0, RESERVED)
    assert measured[:2] == [(256, 100), (255 if most else 256, 85 if most else 1)]


def test_models_say_what_memory_goes_to(monkeypatch, tmp_path):
    from scripted import ScriptedClient, ScriptedEngine

    monkeypatch.setattr("server.api.serving.variants.EngineClient", ScriptedClient)
    monkeypatch.setattr("server.hub.engines.Supervisor", ScriptedEngine)
    path = write_checkpoint(tmp_path / "c", GATED)

    async def work():
        app, _ = create_server(Settings(variants={"dense": str(path)}), print)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as http,
        ):
            answer = (await http.get("/v1/models/dense")).json()
        return answer["lowkey"]

    said = asyncio.run(work())
    assert said["slots"] == 4 and said["memory"] == {"weights": 1, "states": 5}
