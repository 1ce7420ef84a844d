"""The benchmarks that judge by themselves whether all is well do run, and say so."""

import asyncio
import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from xml.etree import ElementTree as ET

import httpx
import pytest

from server.wire.messages import Abort, Generate, Pause, Sampling, unpack_top

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"


def run(script, *options, json_file):
    """What a benchmark prints, and what it writes."""
    result = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *map(str, options), "--json", str(json_file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(json_file.read_text())


def test_a_place_that_takes_no_file_is_found_out_before_the_work(tmp_path):
    writing = {
        file.name: file.read_text()
        for file in (ROOT / "benchmarks").glob("*.py")
        if re.search(r'"--json"|json: Annotated', file.read_text())
    }
    assert len(writing) > 7 and all("figures_file" in source for source in writing.values())
    (tmp_path / "file").write_text("a file")
    place = tmp_path / "file" / "figures.json"
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "capacity.py", "--json", place],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {place} can't be written: ") and result.stderr.count("\n") == 1


def test_a_server_that_never_gets_ready_is_stopped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from _serving import Server

    script, pid = tmp_path / "serve", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {pid}\necho running on http://127.0.0.1:1\nexec sleep 600\n")
    script.chmod(0o755)
    with pytest.raises(httpx.ConnectError):
        Server({"dense": tmp_path}, script=script)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("options", [(), ("--chat", "--logprobs", 2)])
def test_what_the_front_end_costs(options, tmp_path):
    """The clients themselves fail unless all tokens of each answer have come."""
    output, found = run(
        "frontend.py", "--streams", 1, 5, "--tokens", 12, "--rate", 0, "--rounds", 2, "--seconds", 0.5, *options,
        json_file=tmp_path / "frontend.json",
    )  # fmt: skip
    assert [result["streams"] for result in found["results"]] == [1, 5]
    for result in found["results"]:
        assert len(result["rounds"]) == 2
        for figures in result["rounds"]:
            assert figures["tokens_per_second"] > 0 and figures["api_us_per_token"] >= 0
            assert 1 / 12 <= figures["chunks_per_token"] <= 1
    assert "as many steps as possible, 12 tokens a request" in output


def test_the_stand_in_of_an_engine_does_what_it_is_asked_for(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from stand_in_engine import StandInEngine

    def generate(name, **more):
        sampling = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=8)
        return Generate(request_id=name, token_ids=[1], sampling=sampling, stop_token_ids=[], **more)

    engine = StandInEngine(list(range(10, 20)), rate=0, max_running=2)
    assert engine.idle and engine.step() is None
    for message in (
        generate("a", max_tokens=3, logprobs=2),
        generate("b", max_tokens=5),
        generate("c", max_tokens=1),
        Pause(request_id="a"),
    ):
        engine.handle(message)
    steps = [engine.step(), engine.step()]
    engine.handle(Abort(request_id="b"))
    steps.append(engine.step())
    assert engine.idle and engine.step() is None
    assert [[(t.request_id, t.token_id, t.finish_reason) for t in step.tokens] for step in steps] == [
        [("a", 18, None), ("b", 18, None)],
        [("a", 19, None), ("b", 19, None)],
        [("a", 10, "length"), ("c", 18, "length")],
    ]
    first, second = steps[0].tokens
    top = unpack_top(first.top)
    assert len(top) == 2 and top[0] == (18, first.logprob) and second.top is None


def test_engines_are_no_part_of_what_the_api_costs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from server_process import ServerProcess

    script = tmp_path / "server"
    start = "sh -c 'echo $0 $$; sleep 600; :'"
    script.write_text(f"""{start} '"variant":"dense"' & {start} other & wait""")
    with subprocess.Popen(["sh", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as p:
        try:
            children = dict(p.stdout.readline().split() for _ in range(2))
            found = ServerProcess.api_processes(SimpleNamespace(process=p))
        finally:
            os.killpg(p.pid, signal.SIGKILL)
    assert found[:2] == [p.pid, int(children["other"])]
    assert int(children['"variant":"dense"']) not in found


@pytest.fixture
def clients(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import stream_clients

    return stream_clients


WANTED = 6
"""Tokens of the stream that `read` reads."""


def read(clients, cuts, logprobs=0, usage=WANTED):
    """Have a client read one answer.

    Args:
        cuts: the tokens at which chunks end.
        logprobs: how many tokens come with their log-probability.
        usage: how many tokens the server says there are.

    Returns:
        tokens of each chunk, and what the client finds wrong with the answer.
    """
    model = ROOT / "demo" / "model"
    task = clients.Task("http://x", 1, model, "dense", WANTED, 1 if logprobs else None, False)
    texts, seen, wrong, warm = clients.Texts(task), clients.Seen(), [], []
    ends = [0, *texts.lengths(texts.seed(0))]
    tokenizer, _ = clients.TokenizerFile(model).open()
    text = tokenizer.decode(clients.text_ids(model)[: WANTED + 1])
    events = [{"choices": [{"text": text[ends[a] : ends[b]]}]} for a, b in itertools.pairwise([0, *cuts])]
    events[-1]["choices"][0]["logprobs"] = {"tokens": ["x"] * logprobs}
    events.append({"choices": [], "usage": {"completion_tokens": usage}})
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    answer = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()

    async def received():
        stream = clients.Stream(task, texts, 0, seen, lambda: warm.append(True), wrong.append)
        stream.connection_made(Mock())
        for i in range(0, len(answer), 50):
            stream.data_received(answer[i : i + 50])

    asyncio.run(received())
    assert bool(warm) != bool(wrong)
    return list(seen.tokens), wrong


def test_clients_count_tokens_however_they_are_merged(clients):
    assert read(clients, [1, 2, 3, 4, 5, 6]) == ([1] * 6, [])
    assert read(clients, [1, 4, 6], logprobs=6) == ([1, 3, 2], [])


@pytest.mark.parametrize(
    ("cuts", "given", "said"),
    [
        ([1, 5], {}, "'tokens of text': 5"),
        ([1, 6], {"usage": 7}, "'tokens of usage': 7"),
        ([1, 6], {"logprobs": 5}, "'log-probabilities': 5"),
    ],
)
def test_clients_say_what_is_missing(clients, cuts, given, said):
    _, (wrong,) = read(clients, cuts, **given)
    assert wrong.startswith("a stream of 6 tokens ended with") and said in wrong


HYBRID = """
from dataclasses import replace
from types import SimpleNamespace

import torch
from checkpoints import GATED
from second_kind import AverageSpec, registered

import measure
from peer import peer_of
from prefill import rules
from modeling.families import family_of
from modeling.model import Model

spec = family_of(GATED).spec(GATED)
other, *linear = (replace(spec.layers[0], mixer=AverageSpec(48)), *spec.layers[1:])
with registered():
    hybrid = Model(replace(spec, layers=(other, *linear)))
    for layers in ((other, *linear), (other, other)):
        try:
            peer_of(Model(replace(spec, layers=layers)))
        except ValueError as e:
            print(e)
print(sorted(rules(hybrid, 1, 64)))
measure.open_checkpoint = lambda source: SimpleNamespace(spec=hybrid.spec, config=GATED)
print(measure.load("hybrid", 16, torch.float32).spec.d_k)
"""


def in_benchmarks(code):
    """What code prints that imports benchmarks, in a process of its own: the peer hides fla."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", SUPPORT)))},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_speed_is_of_linear_layers_wherever_they_are():
    *refused, sides, d_k = in_benchmarks(HYBRID).splitlines()
    assert len(refused) == 2 and all("linear attention and a dense feed-forward" in line for line in refused)
    assert sides == "['rule_ours', 'rule_transformers']" and d_k == "(16, 16, 16)"


@pytest.mark.slow
def test_prompts_are_compared_with_what_transformers_computes(tmp_path):
    _, found = run("prefill.py", "demo/model", "--seconds", 0, json_file=tmp_path / "prefill.json")
    assert found["cases"]
    assert all(0 < c["logits_difference"] < 1e-5 and c["speedup"]["median"] > 0 for c in found["cases"])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["tiny", "tiny-experts"])
def test_hybrids_are_compared_with_what_transformers_computes(shape, tmp_path):
    """The benchmark itself ends where the logits of both sides differ; here it must also not call them the same
    without having looked."""
    output, found = run(
        "hybrids.py", shape, "--d-k", 128, "--d-k", 64, "--dtype", "float32", "--prefill", "2x70", "--context", 70,
        "--batch", 3, "--seconds", 0, json_file=tmp_path / "hybrids.json",
    )  # fmt: skip
    cases = found["cases"]
    assert [(c["d_k"], c["phase"]) for c in cases] == [
        (d_k, phase) for d_k in (128, 64) for phase in ("prefill", "decode")
    ]
    assert all(0 < c["logits_difference"] < 1e-5 and c["speedup"]["median"] > 0 for c in cases)
    dense, reduced = cases[1], cases[3]
    # Three layers of 2 heads: a matrix of d_k x 128 each, and three columns of the short convolution, all float32.
    states = [3 * 3 * (2 * d_k * 128 + 3 * (4 * d_k + 256)) * 4 for d_k in (128, 64)]
    assert [dense["recurrent_bytes"], reduced["recurrent_bytes"]] == states
    assert dense["kv_bytes"] == 3 * 70 * 2 * 2 * 64 * 4
    assert (dense["experts_hit"] > 2) == (shape == "tiny-experts") and "2 x 70" in output


def test_a_benchmark_of_experts_counts_the_bytes_of_those_that_are_hit():
    code = """
from hybrids import weight_bytes
from hybrid_models import config_of
from modeling.families import family_of
from modeling.model import Model

config = config_of("tiny-experts")
model = Model(family_of(config).spec(config))
print(weight_bytes(model, 8), weight_bytes(model, 2))
"""
    every, two = map(float, in_benchmarks(code).split())
    # Four layers of 8 experts with three matrices of 32 x 64, of which 6 are left out.
    assert every - two == 4 * 6 * 3 * 32 * 64 * 4


def test_requests_that_fit_are_counted(tmp_path):
    _, found = run(
        "capacity_hybrids.py", "--budget", "4GiB", "--shape", "0.8B", json_file=tmp_path / "capacity.json"
    )
    slot = {d_k: 18 * (16 * d_k * 128 * 4 + 3 * (2 * 16 * d_k + 16 * 128) * 2) for d_k in (128, 64)}
    page = 64 * 6 * 2 * 2 * 256 * 2
    counted = {
        (r["tokens"], r["d_k"]): (2**32 - slot[r["d_k"]] - page)
        // (slot[r["d_k"]] + r["tokens"] // 64 * page)
        for r in found["results"]
    }
    assert counted == {(r["tokens"], r["d_k"]): r["requests"] for r in found["results"]}
    assert counted[512, 128] == 165 and counted[512, 64] == 264


def test_requests_that_fit_run_together(tmp_path):
    output, found = run(
        "capacity_hybrids.py", "--budget", "90MiB", "--shape", "0.8B", "--tokens", 128, "--run",
        json_file=tmp_path / "capacity.json",
    )  # fmt: skip
    assert [(r["requests"], r["run"]["running"]) for r in found["results"]] == [(3, 3), (7, 7)]
    assert [r["run"]["largest_used_pages"] for r in found["results"]] == [6, 14] and "ran together" in output


def test_conversations_are_really_run(tmp_path):
    output, found = run("prefix_blocks.py", "--workload", "tiny", json_file=tmp_path / "prefix.json")
    computed = found["tiny"]["computed"]
    assert found["tiny"]["prompts"] == 6 and "6 prompts" in output
    assert computed["at most"] < computed["ours"] < found["tiny"]["tokens"] == computed["blocks of 272"]


def test_blocks_hit_at_their_multiples_only(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from prefix_blocks import WORKLOADS, Blocks, turns

    blocks, tokens = Blocks(4), Blocks(1)
    for cache in (blocks, tokens):
        cache.add([1, 2, 3, 4, 5, 6, 7, 8, 9])
    prompts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [2, 2, 3, 4, 5], [1]]
    assert [blocks.cached(p) for p in prompts] == [4, 0, 8, 0, 0]
    assert [tokens.cached(p) for p in prompts] == [5, 3, 9, 0, 0]
    first, second = (list(turns(WORKLOADS["tiny"], 512, seed)) for seed in (0, 0))
    assert first == second and sorted(user for user, _, _ in first) == [0, 0, 0, 1, 1, 1]
    starts = [next(message for user, message, _ in first if user == u) for u in (0, 1)]
    assert starts[0][:100] == starts[1][:100] and starts[0][100:120] != starts[1][100:120]


@pytest.mark.slow
def test_a_minute_of_soak_leaves_everything_as_it_was(tmp_path):
    output, figures = run("soak.py", "--minutes", 1, json_file=tmp_path / "soak.json")
    assert "all as it should be" in output
    assert figures["outcomes"]["200"] > 10 and figures["outcomes"]["left"] > 0


@pytest.mark.slow
def test_no_request_fails_while_servers_are_restarted_one_after_the_other(tmp_path):
    """The delay is many times the proxy's lag, so that a busy machine does not decide."""
    _, figures = run("rolling.py", "--drain-delay", 20, json_file=tmp_path / "rolling.json")
    assert figures["failed"] == {} and figures["while_restarting"] > 10
    assert len(figures["connections"]) >= 3, "clients came to the new servers"


@pytest.mark.parametrize("name", ["tradeoff.svg", "tradeoff-narrow.svg"])
def test_the_readmes_picture_is_drawn_from_the_raw_numbers(name):
    """Its figures are those of the pages' tables, and its bars are as long as the figures say."""
    picture = runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))
    layout = picture["PICTURES"][name]
    drawn = picture["draw"](picture["choices"](), layout)
    assert drawn == (ROOT / "docs" / "images" / name).read_text(), (
        "python benchmarks/picture.py draws it anew"
    )

    shapes = [shape for shape in ET.fromstring(drawn) if shape.get("y")]
    rows = {}  # by height: a bar lies 15 above the line that its figure stands on
    for shape in shapes:
        if shape.tag.endswith("text"):
            rows.setdefault(float(shape.get("y")), {"words": [], "bars": {}})["words"].append(shape.text)
    for shape in shapes:
        if shape.get("class") in ("a", "b", "c"):
            rows[float(shape.get("y")) + 15]["bars"][shape.get("class")] = float(shape.get("width"))
    dense, *others = [row for row in rows.values() if row["bars"]]
    assert [row["words"][-3:] for row in (dense, *others)] == [
        ["6.73 MB", "0", "1.00x"],
        ["3.37 MB", "+0.03 %", "not timed"],
        ["1.84 MB", "+0.65 %", "1.47x"],
        ["3.44 MB", "+2.0 %", "not timed"],
        ["3.44 MB", "+6.9 %", "1.57x"],
        ["0.98 MB", "+9.8 %", "1.97x"],
    ]
    evidence, gpu = ((ROOT / "docs" / page).read_text() for page in ("evidence.md", "gpu.md"))
    for said in ("| int8 | 1,843,200 | +0.65 % |", "| 3,440,640 | **+2.0 %** |", "| 3,440,640 | +6.9 % |"):
        assert said in evidence
    assert "78,059 (1.47" in gpu and "83,847 (1.57" in gpu and "104,766 (1.97" in gpu
    for row in others:
        size, rise, speed = row["words"][-3:]
        expected = {"a": float(size.split()[0]) / 6.73, "b": float(rise[1:-2]) / 9.75}
        if speed != "not timed":
            expected["c"] = float(speed[:-1]) / 1.97
        found = {kind: length / layout.longest for kind, length in row["bars"].items()}
        assert found == pytest.approx(expected, abs=0.012)


def test_a_widened_vocabulary_spells_the_same_texts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.structured import widened
    from modeling.tokenizer import TokenizerFile

    tokenizer, _ = TokenizerFile(ROOT / "demo" / "model").open()
    wide = widened(tokenizer, 9000)
    assert wide.get_vocab_size(with_added_tokens=True) == 9000
    assert sorted(wide.get_vocab(with_added_tokens=True).values()) == list(range(9000))
    text = 'def f(x):\n    return {"é": x}\n'
    assert wide.decode(wide.encode(text).ids) == text
    assert len(wide.encode(text).ids) <= len(tokenizer.encode(text).ids)
