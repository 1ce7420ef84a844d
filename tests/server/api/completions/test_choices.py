"""Several prompts, several choices, echo and log-probabilities, over engines whose answers are known in advance."""

import asyncio
import json
import math

import pytest
from checkpoints import byte_tokenizer
from prometheus_client.metrics import MetricWrapperBase
from scripted import CONTEXT, SCRIPTS, VOCAB, scripted_api

from server.api.completions.answer_schemas import Completion
from server.hub.window import ABWindow
from server.text.detokenizer import TokenTexts
from server.wire.messages import Score

TOKENIZER = byte_tokenizer()


def ids(text):
    return TOKENIZER.encode(text).ids


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        with scripted_api(tmp_path_factory.mktemp("api"), patch, max_queue=12) as client:
            yield client


@pytest.fixture
def script(api):
    script = SCRIPTS["dense"]
    script.seen.clear()
    yield script
    script.queue.clear()
    script.fail_after, script.cached_tokens = None, 0


def complete(api, **fields):
    response = api.post("/v1/completions", json={"model": "dense", "prompt": "Hi", "max_tokens": 8, **fields})
    assert response.status_code == 200, response.text
    Completion.model_validate(response.json(), extra="forbid")
    return response.json()


def events(api, **fields):
    body = {"model": "dense", "prompt": "Hi", "max_tokens": 8, "stream": True, **fields}
    response = api.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    blocks = [block.removeprefix("data: ") for block in response.text.split("\n\n")]
    assert blocks[-2:] == ["[DONE]", ""]
    return [json.loads(block) for block in blocks[:-2]]


def refused(api, param, **fields):
    response = api.post("/v1/completions", json={"model": "dense", "prompt": "Hi", "max_tokens": 8, **fields})
    assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    return response.json()["error"]["message"]


FORMS = [
    (["Hi", "there", "Hi"], [ids("Hi"), ids("there"), ids("Hi")]),
    ([[5, 6], [7]], [[5, 6], [7]]),
    (["Hi"], [ids("Hi")]),
    ([[5, 6, 7]], [[5, 6, 7]]),
    ([5, 6, 7], [[5, 6, 7]]),
]


@pytest.mark.parametrize(("prompt", "expected"), FORMS)
@pytest.mark.parametrize("n", [1, 3])
def test_each_prompt_has_n_choices_in_order(api, script, prompt, expected, n):
    body = complete(api, prompt=prompt, n=n, seed=5)
    assert [c["index"] for c in body["choices"]] == list(range(len(expected) * n))
    sent = sorted(
        script.seen, key=lambda message: (expected.index(message.token_ids), message.sampling.choice)
    )
    assert len({message.request_id for message in sent}) == len(expected) * n
    assert {m.sampling.seed for m in sent} == {5}
    assert [m.sampling.choice for m in script.seen] == list(range(n)) * len(expected)
    assert [m.token_ids for m in script.seen] == [p for p in expected for _ in range(n)]
    # Each is what it is alone, and a prompt counts once.
    for i, choice in enumerate(body["choices"][:: n or 1]):
        assert choice["text"] == complete(api, prompt=expected[i], seed=5)["choices"][0]["text"]
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] <= 8 * n * len(expected)
    texts = [c["text"] for c in body["choices"][:n]]
    assert len(set(texts)) == n


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["Hi", "you"], "n": 2}, {"echo": True, "n": 2}])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_stream_of_several_choices_is_the_whole_answer(api, fields, logprobs):
    fields = {"seed": 3, "max_tokens": 12, "logprobs": logprobs, "temperature": 1.5, **fields}
    whole = complete(api, **fields)
    chunks = events(api, **fields, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert [("lowkey" in c) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    for expected in whole["choices"]:
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == expected["index"]]
        assert "".join(c["text"] for c in own) == expected["text"]
        assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + [expected["finish_reason"]]
        if logprobs is None:
            assert all(c["logprobs"] is None for c in own)
        else:
            for key, values in expected["logprobs"].items():
                assert [v for c in own for v in c["logprobs"][key]] == values


def test_the_block_of_several_choices_is_of_all(api):
    one, three = complete(api)["lowkey"], complete(api, n=3)["lowkey"]
    assert three["state_bytes"] == 3 * one["state_bytes"]
    assert three["finish_reason"] in ("length", "stop", None) and three["ttft_s"] > 0
    chunks = events(api, n=2)
    assert "lowkey" in chunks[-1] and not any("lowkey" in c for c in chunks[:-1])


def test_echo_gives_back_the_prompt(api):
    assert complete(api, echo=True, seed=1)["choices"][0]["text"] == (
        "Hi" + complete(api, seed=1)["choices"][0]["text"]
    )
    only = complete(api, prompt=["Hi", "you"], echo=True, max_tokens=0)
    assert [c["text"] for c in only["choices"]] == ["Hi", "you"]
    assert {c["finish_reason"] for c in only["choices"]} == {"length"}
    assert only["usage"]["completion_tokens"] == 0 and only["usage"]["prompt_tokens"] == 5
    assert complete(api, prompt=ids("Hi"), echo=True, max_tokens=0)["choices"][0]["text"] == "Hi"
    assert "at least 1" in refused(api, "max_tokens", max_tokens=0)


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("prompt", ["Hello é", [5], [[5, 6], ids("abc")]])
def test_logprobs_of_the_prompt_and_what_follows(api, script, prompt, max_tokens):
    fields = dict(prompt=prompt, echo=True, logprobs=1, temperature=0)
    body = complete(api, **fields, max_tokens=max_tokens)
    prompts = (
        [ids(prompt)] if isinstance(prompt, str) else prompt if isinstance(prompt[0], list) else [prompt]
    )
    for choice, prompt_ids in zip(body["choices"], prompts, strict=True):
        got = choice["logprobs"]
        count = len(prompt_ids) + max_tokens
        assert [len(got[key]) for key in got] == [count] * 4
        assert got["token_logprobs"][0] is None and got["top_logprobs"][0] is None
        last = prompt_ids[0]
        for i, token_id in enumerate(prompt_ids[1:], 1):
            assert got["token_logprobs"][i] == script.logprobs[last, token_id]
            assert max(got["top_logprobs"][i].values()) == script.logprobs[last].max()
            last = token_id
        for own, top in list(zip(got["token_logprobs"], got["top_logprobs"], strict=True))[len(prompt_ids) :]:
            assert own == max(top.values())  # greedy, to the bit
        assert got["text_offset"][0] == 0 and got["text_offset"] == sorted(got["text_offset"])
        if max_tokens == 0:
            text = TOKENIZER.decode(prompt_ids)
            assert [text[o : o + 1] for o in got["text_offset"]][:5] == list(text)[:5]


def test_the_likelier_of_two_tokens_with_one_text_is_kept(api, script):
    """Bytes that are no characters all are U+FFFD."""
    high = [TOKENIZER.encode("é").ids[0], TOKENIZER.encode("漢").ids[0]]
    script.queue.append([high[0]])
    got = complete(api, logprobs=20, max_tokens=1)["choices"][0]["logprobs"]
    (top,) = got["top_logprobs"]
    assert got["tokens"] == ["\ufffd"]
    last = ids("Hi")[-1]
    candidates = [i for i, _ in script.top(last, 20)] + [high[0]]
    texts = {i: TOKENIZER.decode([i], skip_special_tokens=False) for i in candidates}
    for text, value in top.items():
        assert value == max(script.logprobs[last, i] for i in candidates if texts[i] == text)


def test_zero_logprobs_are_the_tokens_own(api):
    got = complete(api, logprobs=0, max_tokens=4)["choices"][0]["logprobs"]
    assert all(len(top) == 1 for top in got["top_logprobs"])
    assert [next(iter(top.values())) for top in got["top_logprobs"]] == got["token_logprobs"]


def test_an_end_of_text_is_an_entry(api, script):
    script.queue += [[*ids("ab"), 0]] * 2
    choice = complete(api, logprobs=1)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "b", "<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    chunks = [c["choices"][0] for c in events(api, logprobs=1)]
    assert [c["logprobs"]["tokens"] for c in chunks] == [["a"], ["b"], ["<|endoftext|>"]]
    assert [c["text"] for c in chunks] == ["a", "b", ""]


def test_held_bytes_come_with_the_piece_that_they_are_part_of(api, script):
    text = "aé漢b"
    script.queue.append(ids(text))
    chunks = events(api, logprobs=1, max_tokens=len(ids(text)))
    pieces = [(c["choices"][0]["text"], len(c["choices"][0]["logprobs"]["tokens"])) for c in chunks]
    assert pieces == [("a", 1), ("é", 2), ("漢", 3), ("b", 1), ("", 0)]
    offsets = [o for c in chunks for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 1, 2, 2, 2, 3]


def test_a_prompt_with_no_finite_score_is_an_error(api, script, monkeypatch):
    logprobs = script.logprobs.copy()
    logprobs[ids("H")[0]] = math.nan
    monkeypatch.setattr(script, "logprobs", logprobs)
    body = {"model": "dense", "prompt": "Hi", "max_tokens": 0, "echo": True, "logprobs": 1}
    response = api.post("/v1/completions", json=body)
    assert response.status_code == 500 and "NaN" in response.json()["error"]["message"]


def test_what_the_engine_is_told(api, script):
    complete(
        api,
        presence_penalty=0.5,
        frequency_penalty=-1,
        repetition_penalty=1.25,
        logit_bias={"5": 1, "256": -100},
        min_tokens=3,
        logprobs=4,
        priority=7,
        ignore_eos=True,
        echo=True,
    )
    score, message = script.seen
    assert isinstance(score, Score) and (score.top_logprobs, score.from_position, score.priority) == (4, 1, 7)
    how = message.sampling
    assert (how.presence_penalty, how.frequency_penalty, how.repetition_penalty) == (0.5, -1.0, 1.25)
    assert how.logit_bias == {5: 1.0, 256: -100.0}
    assert (message.min_tokens, message.logprobs, message.priority) == (3, 4, 7)
    complete(
        api, priority=-3, logit_bias=None, min_tokens=None, presence_penalty=None, repetition_penalty=None
    )
    message = script.seen[-1]
    assert message.priority == 0, "no more urgent than the configuration allows"
    assert (message.min_tokens, message.sampling.logit_bias, message.logprobs) == (0, {}, None)
    assert message.sampling.repetition_penalty == 1.0


@pytest.mark.parametrize(("asked", "given"), [(7, 7), (-3, 0), (None, 0)])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_comparison_has_a_priority_that_is_capped_as_well(api, script, asked, given, parallel):
    script.queue.append(ids("Hi"))
    body = {"prompt": "Hi", "max_tokens": 2, "priority": asked, "parallel": parallel}
    assert api.post("/v1/compare", json=body).status_code == 200
    completion, score = script.seen
    assert completion.priority == given
    assert isinstance(score, Score) and score.priority == 0, (
        "it holds the memory that other comparisons wait for"
    )


def test_a_bias_of_a_token_that_there_is_not_is_a_400_in_a_stream_too(api):
    for stream in (False, True):
        body = {"prompt": "Hi", "max_tokens": 2, "logit_bias": {str(VOCAB): 1}, "stream": stream}
        answer = api.post("/v1/compare", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "logit_bias", answer.text


def test_the_order_of_timed_comparisons_alternates_also_as_the_page_runs_them(api, script):
    firsts = []
    for _ in range(4):
        for parallel in (True, False):  # the page: side by side, then one after the other
            body = {"prompt": "Hi", "max_tokens": 1, "temperature": 0, "stream": True, "parallel": parallel}
            first = api.post("/v1/compare", json=body).text.split("\n\n")[0]
        firsts.append(json.loads(first.removeprefix("data: "))["variant"])
    assert firsts in (["dense", "reduced"] * 2, ["reduced", "dense"] * 2)


def test_the_summary_is_worked_out_beside_the_loop(api, monkeypatch):
    traffic, loops = ABWindow.traffic, []

    def watched(window, *args):
        loops.append(asyncio._get_running_loop())
        return traffic(window, *args)

    monkeypatch.setattr(ABWindow, "traffic", watched)
    assert set(api.get("/v1/ab/summary").json()["variants"]) == {"dense", "reduced"}
    assert loops == [None, None]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_log_probabilities_of_a_whole_answer_are_put_down_beside_the_loop(api, script, monkeypatch, path):
    text, loops = TokenTexts.text, []

    def watched(texts, token_id):
        loops.append(asyncio._get_running_loop())
        return text(texts, token_id)

    monkeypatch.setattr(TokenTexts, "text", watched)
    body = {
        "model": "dense",
        "prompt": "Hi",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 3,
    }
    logprobs = {"logprobs": 2} if path == "completions" else {"logprobs": True, "top_logprobs": 2}
    assert api.post(f"/v1/{path}", json={**body, **logprobs}).status_code == 200
    assert len(loops) >= 9 and not any(loops)


def test_no_stop_string_counts_before_min_tokens(api, script):
    script.queue += [ids("axaxaxax")] * 3
    assert complete(api, stop="x")["choices"][0]["text"] == "a"
    assert complete(api, stop="x", min_tokens=4)["choices"][0]["text"] == "axa"
    assert complete(api, stop="x", min_tokens=5)["choices"][0]["text"] == "axaxa"


def test_cached_tokens_are_in_the_usage(api, script):
    script.cached_tokens = 2
    body = complete(api, n=2)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert body["lowkey"]["cached_tokens"] == 2


def test_a_failure_of_one_choice_ends_all(api, script):
    client = api.app.state.service.variants.get("dense").client
    engine = api.app.state.hub.engines["dense"]
    before = client.aborted
    script.fail_after = 3
    body = {"model": "dense", "prompt": ["Hi", "you"], "max_tokens": 8, "ignore_eos": True}
    response = api.post("/v1/completions", json=body)
    assert response.status_code == 500 and response.json()["error"]["message"] == "the engine broke"
    chunks = events(api, n=2, ignore_eos=True)
    assert chunks[-1]["error"]["code"] == 500
    assert not any("error" in c or c["choices"][0]["finish_reason"] for c in chunks[:-1])
    assert engine.admitted == 0 and client.aborted >= before


def test_places_are_counted_by_choice(api):
    # 4 run and 12 wait.
    assert len(complete(api, n=16, max_tokens=1)["choices"]) == 16
    assert "16" in refused(api, "n", n=17)
    assert "16" in refused(api, "n", prompt=["a"] * 9, n=2)


def test_limits_hold_for_each_prompt(api):
    assert str(CONTEXT) in refused(api, "max_tokens", prompt=["a", "b" * (CONTEXT - 1)])
    assert "empty" in refused(api, "prompt", prompt=["a", ""])
    assert str(VOCAB) in refused(api, "prompt", prompt=[[5], [VOCAB]])


def test_best_of_is_no_more_than_n(api):
    assert len(complete(api, n=2, best_of=2)["choices"]) == 2
    refused(api, "best_of", n=2, best_of=3)
    refused(api, "best_of", n=2, best_of=1)


def test_continuous_usage_is_exact_for_several_choices(api):
    chunks = events(api, n=2, seed=1, ignore_eos=True, stream_options={"continuous_usage_stats": True})
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts) and counts[-1] == 16
    assert all(c["usage"]["prompt_tokens"] == 2 for c in chunks)


def test_an_interval_is_of_each_choice(api, script):
    script.queue += [ids("abcdefg"), ids("ABCDEFG")]
    chunks = events(api, n=2, max_tokens=7, logprobs=0, stream_options={"stream_interval": 4})
    for index, texts in enumerate((["a", "bcde", "fg", ""], ["A", "BCDE", "FG", ""])):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [c["text"] for c in own] == texts
        assert ["".join(c["logprobs"]["tokens"]) for c in own] == texts
    for bad in (0, 257, "2", 1.5):
        assert "stream_interval" in refused(
            api, "stream_options", stream=True, stream_options={"stream_interval": bad}
        )


def test_a_token_looks_up_no_series(api, script, monkeypatch):
    """Looking one up by its labels takes longer than all else that is measured of a token."""
    looked_up = []
    labels = MetricWrapperBase.labels
    monkeypatch.setattr(MetricWrapperBase, "labels", lambda *a, **k: looked_up.append(a) or labels(*a, **k))
    counts = []
    for length in (2, 30):
        looked_up.clear()
        script.queue.append(ids("x" * length))
        assert len(events(api, max_tokens=length)) == length + 1
        counts.append(len(looked_up))
    assert counts[0] == counts[1]
