"""Hybrids on a real server, as clients see them: with pages to spare, and with so few that requests are preempted all
the time. Tokens must be the same; both servers are batch-invariant, so that they are to the last bit.

The other tests of a real server run on hybrids with LOWKEY_TEST_MODEL=qwen.
"""

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from checkpoints import byte_tokenizer
from live_server import DEADLINE_S, LiveServer, poll, write_variants

from modeling.checkpoint import open_checkpoint
from modeling.runtime import TorchRuntime
from modeling.spec import StateTypes
from modeling.state import PAGE_TOKENS, StatePool

DENSE = {"variant": "dense", "engine": "0"}
SLOTS, PAGES = 6, 12
LONGEST = PAGES * PAGE_TOKENS


def prompt(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(1, 257, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    return write_variants(tmp_path_factory.mktemp("hybrids"), "qwen")


@pytest.fixture(scope="module")
def roomy(hybrids, tmp_path_factory):
    """Both variants, with pages for 16 requests of any length."""
    directory = tmp_path_factory.mktemp("roomy")
    server = LiveServer(
        directory / "log",
        *(f"{name}={path}" for name, path in hybrids.items()),
        *("--max-requests", "16", "--batch-invariant"),
        LOWKEY_STATE_DIR=str(directory / "states"),
    )
    try:
        yield server.wait_ready("dense", "reduced")
    finally:
        server.stop()


@pytest.fixture(scope="module")
def tight(hybrids, tmp_path_factory):
    """The dense variant, with two pages for each of its six requests on the average."""
    directory = tmp_path_factory.mktemp("tight")
    server = LiveServer(
        directory / "log",
        f"dense={hybrids['dense']}",
        *("--max-requests", str(SLOTS), "--context-tokens", str(LONGEST // SLOTS), "--batch-invariant"),
        LOWKEY_STATE_DIR=str(directory / "states"),
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def complete(server, **fields):
    """The body of a completion's 200, whichever thread asks."""
    body = {"model": "dense", "ignore_eos": True, **fields}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE_S)
    assert answer.status_code == 200, answer.text
    return answer.json()


def told(answer):
    """What must not depend on how many pages there are."""
    kept = [{k: v for k, v in choice.items() if k != "logprobs"} for choice in answer["choices"]]
    return kept, [choice["logprobs"] for choice in answer["choices"]], answer["lowkey"]["kv_bytes"]


def check_unused(server):
    """Nobody holds a slot or a page, and a request can have all the pages that there are."""
    server.wait_idle()
    pages = {use: server.sample("lowkey_kv_pages", **DENSE, state=use) for use in ("used", "cached", "free")}
    assert pages["used"] == 0 and pages["cached"] + pages["free"] == PAGES
    longest = complete(server, prompt=prompt(LONGEST - 1), max_tokens=1)
    assert longest["usage"]["prompt_tokens"] == LONGEST - 1
    assert server.sample("lowkey_engine_restarts_total", **DENSE) == server.restarts


@pytest.fixture(autouse=True)
def _count(request):
    if "tight" in request.fixturenames:
        tight = request.getfixturevalue("tight")
        tight.restarts = tight.sample("lowkey_engine_restarts_total", **DENSE)


@torch.inference_mode()
def greedy(path, ids, n):
    """A plain loop over the model in float64."""
    model = open_checkpoint(path).load(dtype=torch.float64)
    pool = StatePool.with_room(model.spec, 1, len(ids) + n, types=StateTypes(torch.float64, torch.float64))
    slot = torch.tensor([0])
    hidden, state = model(torch.tensor(ids), [0, len(ids)])
    pool.scatter(slot, state)
    pool.advance(slot, [0, len(ids)])
    tokens, hidden = [], hidden[-1:]
    while len(tokens) < n:
        tokens.append(int(model.logits(hidden).argmax()))
        hidden = TorchRuntime(model).decode(torch.tensor(tokens[-1:]), pool, slot)
    return tokens


@pytest.mark.parametrize("variant", ["dense", "reduced"])
def test_completions_are_those_of_the_checkpoint(roomy, hybrids, variant):
    ids = prompt(130)
    fields = dict(model=variant, prompt=ids, max_tokens=70, temperature=0)
    text = byte_tokenizer().decode(greedy(hybrids[variant], ids, 70))
    first, second = complete(roomy, **fields), complete(roomy, **fields)
    assert first["choices"][0]["text"] == second["choices"][0]["text"] == text
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 128, "a prefix of two pages"
    *events, last, done = roomy.events(**fields)
    assert done == "[DONE]"
    pieces = [choice["text"] for event in (*events, last) for choice in json.loads(event)["choices"]]
    assert "".join(pieces) == text and len(pieces) > 10
    assert json.loads(last)["lowkey"]["kv_bytes"] == first["lowkey"]["kv_bytes"]
    several = complete(roomy, **fields, n=3)
    assert [choice["text"] for choice in several["choices"]] == [text] * 3
    assert several["lowkey"]["kv_bytes"] == 3 * first["lowkey"]["kv_bytes"]


def test_log_probabilities_of_a_prompt_are_those_of_its_completion(roomy):
    ids = prompt(100)
    written = complete(roomy, prompt=ids, max_tokens=40, temperature=0, logprobs=1)["choices"][0]
    tokens = byte_tokenizer().encode(written["text"]).ids
    assert len(tokens) == 40, "printable ASCII"
    echoed = complete(roomy, prompt=ids + tokens, max_tokens=0, echo=True, logprobs=1)["choices"][0]
    own = written["logprobs"]["token_logprobs"]
    assert echoed["logprobs"]["token_logprobs"][100:] == pytest.approx(own, abs=1e-4)


def test_a_conversation(roomy):
    messages = [{"role": "user", "content": "Once upon a time"}]
    body = {"model": "dense", "messages": messages, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    answer = roomy.http.post("/v1/chat/completions", json=body).json()
    text = "<user>Once upon a time<|endoftext|>\n<assistant>"
    same = complete(roomy, prompt=text, max_tokens=20, temperature=0)
    assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    assert answer["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]


def test_a_comparison(roomy):
    body = {"prompt": prompt(100), "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    base, other = roomy.http.post("/v1/compare", json=body).json()["results"]
    assert other["against_baseline"]["mean_kl"] > 0
    assert len(other["against_baseline"]["kl"]) == 30
    assert base["lowkey"]["kv_bytes"] == other["lowkey"]["kv_bytes"] > 0
    assert base["lowkey"]["recurrent_bytes"] == 2 * other["lowkey"]["recurrent_bytes"]
    again = {**body, "variants": ["dense", "reduced"], "baseline": "dense", "parallel": True}
    parallel = roomy.http.post("/v1/compare", json=again).json()["results"][1]["against_baseline"]
    assert parallel["kl"] == pytest.approx(other["against_baseline"]["kl"], abs=1e-5)


def test_a_saved_state_goes_on_wherever_it_is_brought(roomy, tight):
    """It is exported from one server, which lists it, and imported by another, where its pages are few."""
    ids, rest = prompt(150), prompt(5, 1)
    state = roomy.http.post("/v1/states", json={"model": "dense", "prompt": ids}).json()
    data = roomy.http.get(f"/v1/states/{state['id']}/content").content
    fields = dict(prompt=rest, max_tokens=60, temperature=1, seed=7, n=4)
    whole = complete(roomy, **{**fields, "prompt": ids + rest})
    forked = complete(roomy, **fields, state_id=state["id"])
    assert told(forked) == told(whole)
    assert len({choice["text"] for choice in forked["choices"]}) == 4
    brought = tight.http.post("/v1/states/import", content=data)
    assert brought.status_code == 200, brought.text
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(complete, tight, **fields, state_id=brought.json()["id"]) for _ in range(4)]
        assert all(told(answer.result()) == told(whole) for answer in asked)
    refused = roomy.http.post(
        "/v1/completions", json={"model": "reduced", "prompt": "x", "state_id": state["id"]}
    )
    assert refused.status_code == 409 and "'dense'" in refused.json()["error"]["message"]
    check_unused(tight)


PRESSURE = {
    "many at once": [dict(prompt=prompt(30, i), max_tokens=200) for i in range(10)],
    "choices of a long prompt": [dict(prompt=prompt(LONGEST // 2), max_tokens=80, n=6)],
    "one prompt": [dict(prompt=prompt(200), max_tokens=100, seed=i) for i in range(10)],
    "priorities": [dict(prompt=prompt(40, i), max_tokens=150, priority=i % 3) for i in range(9)],
    "just as many as fit": [dict(prompt=prompt(LONGEST - 70, i), max_tokens=70) for i in range(3)],
    "stop strings": [dict(prompt=prompt(60, i), max_tokens=300, stop=["e", "ab"]) for i in range(8)],
    "logprobs": [
        dict(prompt=prompt(60, i), max_tokens=120, logprobs=2, presence_penalty=1) for i in range(8)
    ],
}


@pytest.mark.parametrize("name", PRESSURE)
def test_few_pages_change_no_text(roomy, tight, name):
    requests = [{"temperature": 1, "seed": 3, **request} for request in PRESSURE[name]]
    before = tight.sample("lowkey_preemptions_total", **DENSE)
    with ThreadPoolExecutor(len(requests)) as threads:
        few = list(threads.map(lambda request: complete(tight, **request), requests))
        enough = list(threads.map(lambda request: complete(roomy, **request), requests))
    assert [told(answer) for answer in few] == [told(answer) for answer in enough]
    check_unused(tight)
    if name in ("many at once", "priorities", "logprobs"):  # others may end before, or share their pages
        assert tight.sample("lowkey_preemptions_total", **DENSE) > before


def test_who_leaves_gives_back_pages_running_and_preempted(tight):
    before = tight.sample("lowkey_preemptions_total", **DENSE)
    body = {"model": "dense", "prompt": prompt(30), "max_tokens": LONGEST - 30, "n": SLOTS, "stream": True}
    with (
        httpx.Client(base_url=tight.url, timeout=DEADLINE_S) as client,
        client.stream("POST", "/v1/completions", json={**body, "ignore_eos": True}) as response,
    ):
        lines = response.iter_lines()  # to give it up would be to leave
        next(lines)
        poll(lambda: tight.sample("lowkey_preemptions_total", **DENSE) > before, "pages have run out")
    check_unused(tight)


@contextlib.contextmanager
def load(server, expected, **fields):
    """More clients than there is room for ask for the same in this block, again and again, and take nothing but the
    expected text for a 200. The list of all statuses, 0 for a connection that was refused or cut."""
    statuses, over = [], threading.Event()

    def ask(seed):
        body = {"model": "dense", "ignore_eos": True, **fields, "seed": seed}
        while not over.is_set():
            try:
                answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=DEADLINE_S)
            except httpx.TransportError:
                statuses.append(0)
            else:
                assert answer.status_code != 200 or answer.json()["choices"][0]["text"] == expected
                statuses.append(answer.status_code)
            over.wait(0.0 if statuses[-1] == 200 else 0.1)

    with ThreadPoolExecutor(2 * SLOTS) as threads:
        clients = [threads.submit(ask, seed) for seed in range(2 * SLOTS)]
        try:
            poll(lambda: server.sample("lowkey_requests_preempted", **DENSE) > 0, "pages have run out")
            yield statuses
        finally:
            over.set()
        for client in clients:
            client.result()


LONG = dict(prompt=prompt(50), max_tokens=400, temperature=0, cache_salt="of those who ask again and again")


def test_a_killed_engine_comes_back_with_all_its_pages(roomy, tight):
    expected = complete(roomy, **LONG)["choices"][0]["text"]
    with load(tight, expected, **LONG) as statuses:
        tight.engines()["dense"].kill()
        poll(lambda: 503 in statuses, "it is down")
        tight.wait_ready("dense")
        answered = statuses.count(200)
        poll(lambda: statuses.count(200) > answered, "it answers")
    tight.restarts += 1
    check_unused(tight)


def test_a_stop_while_requests_are_preempted_lets_them_end(roomy, tight):
    """The last test of the server: it is told to stop."""
    expected = complete(roomy, **LONG)["choices"][0]["text"]
    with load(tight, expected, **LONG) as statuses:
        tight.process.terminate()
        assert tight.process.wait(DEADLINE_S) == 0
    assert set(statuses) <= {0, 200, 503}
    log = tight.log.read_text()
    assert "Traceback" not in log and "IntegrityError" not in log
