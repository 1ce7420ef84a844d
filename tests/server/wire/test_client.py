"""A real engine process behind an EngineClient: tokens, aborts, deaths, and checkpoints that can't be served."""

import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import time

import msgspec
import psutil
import pytest
from checkpoints import GATED, write_checkpoint
from engine_process import START_S, Harness, engine_config, generated, until
from engines import Bench, generate, prompt, run, sampling, score

from modeling.checkpoint import CheckpointError
from modeling.families import ConfigError
from server.engine.process import build, pick_prefill_tokens, serve
from server.wire.exchange import EngineUnavailableError, StateError
from server.wire.messages import SaveState

CONFIG = {**GATED, "max_position_embeddings": 65536}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("m") / "c", CONFIG)


@pytest.fixture(scope="module")
def harness(bench, tmp_path_factory):
    harness = Harness(engine_config(bench.checkpoint.path), tmp_path_factory.mktemp("run"))
    harness.wait_until_up()
    yield harness
    harness.close()


def test_the_engine_says_what_it_is(harness, bench):
    ready = harness.client.ready
    assert ready.family == "gated_deltanet" and ready.d_k == [32] * 3 and ready.d_v == [24] * 3
    assert ready.state_bytes_per_request == bench.model.spec.state_bytes(0)
    assert ready.weights_bytes == sum(p.nbytes for p in bench.model.parameters())
    assert (ready.slots, ready.vocab_size, ready.context_length) == (4, 257, 65536)
    assert (ready.device, ready.state_dtype, ready.method, ready.eos_token_ids) == (
        "cpu",
        "float32",
        None,
        [0],
    )
    assert ready.checkpoint_path == str(bench.checkpoint.path)
    assert ready.load_s > 0


def test_tokens_and_scores_come_back(harness, bench):
    messages = [generate(prompt(n, seed=n), 6) for n in (1, 64, 150)]
    messages.append(generate(prompt(20), 6, sampling=sampling(seed=-(2**63))))
    messages.append(generate(prompt(20), 6, sampling=sampling(seed=2**63 - 1)))

    async def work():
        asked = score(prompt(100))
        return await asyncio.gather(*(harness.tokens(m) for m in messages), harness.client.score(asked))

    *answers, scored = harness.run(work())
    for message, tokens in zip(messages, answers, strict=True):
        assert [t.finish_reason for t in tokens] == [None] * 5 + ["length"]
        bench.check_tokens(message, [t.token_id for t in tokens])
    assert len(scored.logprobs) == 99 and all(x < 0 for x in scored.logprobs)
    assert len(harness.client._requests) == 0


def test_states_are_saved_and_gone_on_from_across_the_process_boundary(harness, bench, tmp_path):
    before, after = prompt(70), prompt(20, seed=1)
    path = str(tmp_path / "state")

    def save(to):
        return SaveState(request_id=f"save{to[-1:]}", token_ids=before, path=to, fingerprint={"a": "b"})

    harness.run(harness.client.save_state(save(path)))
    tokens = harness.run(harness.tokens(generate(after, 6, state_path=path)))
    bench.check_tokens(generate([*before, *after], 6), [t.token_id for t in tokens])
    with pytest.raises(StateError, match="can't be written"):
        harness.run(harness.client.save_state(save(str(tmp_path / "none" / "x"))))
    with pytest.raises(StateError, match="can't be read"):
        harness.run(harness.tokens(generate(after, 6, state_path=str(tmp_path / "none"))))
    assert len(harness.client._requests) == 0


def test_an_idle_engine_gives_a_sign_of_life_each_second(harness):
    async def work():
        before = len(harness.occupancies)
        await until(lambda: len(harness.occupancies) >= before + 2)

    harness.run(work())


async def none_held(harness):
    await until(lambda: harness.occupancies[-1].used_slots == 0)
    assert harness.occupancies[-1].running == 0 and len(harness.client._requests) == 0


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_leaving_early_aborts(harness, how):
    async def leave():
        got = 0
        async with contextlib.aclosing(generated(harness.client, generate(prompt(5), 60_000))) as tokens:
            async for _ in tokens:
                got += 1
                if got == 3:
                    if how == "break":
                        break
                    asyncio.current_task().cancel()
        return got

    async def work():
        task = asyncio.create_task(leave())
        await asyncio.wait([task])
        assert task.cancelled() == (how == "cancel")
        await none_held(harness)

    harness.run(work())


def test_leaving_while_waiting_for_a_slot_aborts(harness):
    async def work():
        running = [asyncio.create_task(harness.tokens(generate(prompt(5), 60_000))) for _ in range(4)]
        await until(lambda: harness.occupancies[-1].used_slots == 4)
        waiting = asyncio.create_task(harness.tokens(generate(prompt(5), 60_000)))
        await until(lambda: harness.occupancies[-1].waiting == 1)
        waiting.cancel()
        await until(lambda: harness.occupancies[-1].waiting == 0)
        assert harness.occupancies[-1].used_slots == 4 and len(harness.client._requests) == 4
        for task in running:
            task.cancel()
        await none_held(harness)

    harness.run(work())


def test_killed_engine_fails_its_requests_and_comes_back(harness, bench):
    downs, loads = harness.downs, len(harness.readies)

    async def work():
        tasks = [asyncio.create_task(harness.tokens(generate(prompt(5), 60_000))) for _ in range(6)]
        tasks.append(asyncio.create_task(harness.client.score(score(prompt(60_000)))))
        await until(lambda: harness.occupancies[-1].used_slots == 4)
        harness.engine().kill()
        for task in tasks:
            with pytest.raises(EngineUnavailableError, match="'dense' went down"):
                await task
        assert not harness.client.up and harness.client.ready is not None
        assert len(harness.client._requests) == 0 and harness.downs == downs + 1
        with pytest.raises(EngineUnavailableError, match="is not up"):
            await harness.tokens(generate(prompt(5), 1))
        with pytest.raises(EngineUnavailableError, match="is not up"):
            await harness.client.score(score(prompt(5)))

    harness.run(work())
    harness.wait_until_up()
    assert len(harness.readies) == loads + 1
    message = generate(prompt(70), 5)
    bench.check_tokens(message, [t.token_id for t in harness.run(harness.tokens(message))])
    assert harness.fatals == [] and harness.downs == downs + 1


def test_an_engine_that_hangs_is_killed_and_its_requests_fail(bench, tmp_path, caplog):
    harness = Harness(engine_config(bench.checkpoint.path, variant="hanging"), tmp_path, hang_s=2000.0)
    supervisor = harness.supervisor
    try:
        harness.wait_until_up()

        async def work():
            # Idle or busy, whatever the engine says is a sign of life.
            supervisor._silent_s = 1000.0
            await until(lambda: supervisor._silent_s < 1000)
            task = asyncio.create_task(harness.tokens(generate(prompt(5), 60_000)))
            await until(lambda: len(harness.steps) > 20)
            supervisor._silent_s, steps = 1000.0, len(harness.steps)
            await until(lambda: len(harness.steps) > steps)
            assert supervisor._silent_s < 1000 and supervisor.up and harness.downs == 0
            engine = harness.engine()
            engine.suspend()
            supervisor.hang_s = 2.0
            with pytest.raises(EngineUnavailableError, match="'hanging' went down"):
                await asyncio.wait_for(task, START_S)
            assert not engine.is_running() and harness.downs == 1
            supervisor.hang_s = 2000.0

        harness.run(work())
        assert "no sign of life for 2 s" in caplog.text
        harness.wait_until_up()
        message = generate(prompt(70), 5)
        bench.check_tokens(message, [t.token_id for t in harness.run(harness.tokens(message))])
    finally:
        harness.close()


def test_a_loop_that_was_held_up_itself_does_not_take_its_engine_for_hung(bench, tmp_path):
    harness = Harness(engine_config(bench.checkpoint.path, variant="patient"), tmp_path)
    try:
        harness.wait_until_up()
        engine = harness.engine()
        engine.suspend()
        silent = harness.supervisor._silent_s
        time.sleep(5)  # nobody runs the loop
        harness.run(asyncio.sleep(0))
        # What was on its way when the engine was held resets it; else it is the one tick that was due.
        assert harness.supervisor._silent_s <= silent + 1 and harness.client.up
        engine.resume()
    finally:
        harness.close()


def test_closing_fails_what_is_pending_and_leaves_no_process(bench, tmp_path):
    failures = 1

    def on_ready():
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("the tokenizer has just been deleted")

    harness = Harness(engine_config(bench.checkpoint.path, variant="closing"), tmp_path, on_ready)
    # Whatever goes wrong on this side, the engine is started again.
    harness.wait_until_up()
    assert len(harness.readies) == 2 and harness.downs == 1
    engine = harness.engine()

    async def work():
        task = asyncio.create_task(harness.tokens(generate(prompt(5), 60_000)))
        await until(lambda: bool(harness.steps))
        await harness.supervisor.close()
        with pytest.raises(EngineUnavailableError):
            await task

    harness.run(work())
    assert not engine.is_running()
    assert harness.downs == 1, "closing is no failure"


def test_prompts_are_fed_as_suits_the_device(bench):
    assert pick_prefill_tokens(engine_config("x", prefill_tokens=None), "cpu") == 128
    assert pick_prefill_tokens(engine_config("x", prefill_tokens=None), "cuda:1") == 4096
    assert pick_prefill_tokens(engine_config("x", prefill_tokens=192), "cuda") == 192
    engine, _ = build(engine_config(bench.checkpoint.path, prefill_tokens=None))
    outputs = run(engine, {0: [generate(prompt(1000), 1)]})
    assert len(outputs) == 8 and {output.phase for output in outputs} == {"prefill"}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_half_the_state_fits_twice(tmp_path, state_dtype):
    free = []
    for d_k in (32, 16):
        path = write_checkpoint(tmp_path / str(d_k), {**CONFIG, "head_dim": d_k, "expand_v": 24 / d_k})
        config = engine_config(path, state_memory=2**22, max_requests=3, state_dtype=state_dtype)
        _, ready = build(config)
        assert ready.state_dtype == state_dtype and ready.max_running == 3
        assert (ready.slots + 1) * ready.state_bytes_per_request <= 2**22
        free.append(ready.slots)
    assert 1.7 < free[1] / free[0] < 2.1


def spoil_shape(path):
    (path / "config.json").write_text(json.dumps({**CONFIG, "intermediate_size": 128}))


def spoil_option(path):
    (path / "config.json").write_text(json.dumps({**CONFIG, "use_short_conv": False}))


def spoil_family(path):
    (path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "llama"}))


def remove_tokenizer(path):
    (path / "tokenizer.json").unlink()


def break_tokenizer(path):
    (path / "tokenizer.json").write_text("{")


def cut_weights(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


SPOILERS = [spoil_shape, spoil_option, spoil_family, remove_tokenizer, break_tokenizer, cut_weights]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_checkpoint_that_cannot_be_served_is_told_from_a_failure(tmp_path, spoil):
    path = write_checkpoint(tmp_path / "c", CONFIG)
    spoil(path)
    with pytest.raises((CheckpointError, ConfigError)):
        build(engine_config(path))


@pytest.mark.parametrize("room", [True, False], ids=["", "and the reason can't be written"])
def test_a_checkpoint_that_cannot_be_served_is_fatal_and_not_tried_again(tmp_path, room):
    path = write_checkpoint(tmp_path / "c", CONFIG)
    remove_tokenizer(path)
    if not room:
        (tmp_path / "spoilt.reason").mkdir()
    harness = Harness(engine_config(path, variant="spoilt"), tmp_path)
    try:
        harness.run(until(lambda: bool(harness.fatals), START_S))
        # The supervisor has ended with it: nothing is left that could start it again.
        harness.run(asyncio.wait_for(asyncio.shield(harness.supervisor._task), START_S))
        (reason,) = harness.fatals
        assert reason.startswith(f"{path}/tokenizer.json is missing" if room else "the log says why")
        assert not harness.readies and not harness.client.up
        assert not [p for p in psutil.Process().children() if '"variant":"spoilt"' in " ".join(p.cmdline())]
    finally:
        harness.close()


def test_the_engine_ends_when_its_parents_pipe_closes_before_it_has_loaded(bench, tmp_path):
    # After it has loaded: test_failures, where the API process is killed.
    addresses = {"request_address": f"ipc://{tmp_path}/in", "report_address": f"ipc://{tmp_path}/out"}
    config = msgspec.json.encode(engine_config(bench.checkpoint.path, **addresses)).decode()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "server.engine.process", config], stdin=subprocess.PIPE
    )
    try:
        process.stdin.close()
        assert process.wait(START_S) == 0
    finally:
        process.kill()
        process.wait()


def test_the_api_process_imports_no_torch():
    code = (
        "import sys, server.api.app, server.cli, server.front_end, server.wire.client\n"
        "heavy = {'torch', 'transformers', 'triton', 'fla'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=START_S)


def test_what_is_there_once_a_model_has_loaded_is_no_garbage(bench, tmp_path, monkeypatch):
    config = engine_config(
        bench.checkpoint.path, request_address=f"ipc://{tmp_path}/in", report_address=f"ipc://{tmp_path}/out"
    )
    read, write = os.pipe()
    os.close(write)  # the parent is gone already
    before = gc.get_freeze_count()
    with open(read) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        serve(config)
    try:
        assert gc.get_freeze_count() > before + 1000
    finally:
        gc.unfreeze()
