"""The openai SDK, unmodified: completions and chat, sync and async, streaming, and its own exceptions."""

import asyncio

import openai
import pytest
from live_server import ENDLESS, poll


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def asynchronous(server):
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


HELLO = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
]


@pytest.mark.parametrize("model", ["dense", "reduced"])
def test_completion(client, model):
    answer = client.completions.create(
        model=model, prompt="Hello", max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert answer.object == "text_completion" and answer.model == model and answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 9, 14)
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= 5
    lowkey = answer.model_extra["lowkey"]
    assert lowkey["variant"] == model and lowkey["finish_reason"] == "length"


def test_streaming(client):
    fields = dict(model="dense", prompt="Hello", max_tokens=12, seed=3, extra_body={"ignore_eos": True})
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_several_prompts_choices_echo_and_logprobs(client):
    answer = client.completions.create(
        model="dense", prompt=["Hello", "Bye"], n=2, echo=True, logprobs=3, max_tokens=4, temperature=0
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.text.startswith("Hello" if choice.index < 2 else "Bye")
        logprobs = choice.logprobs
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert len(logprobs.tokens) == len(logprobs.text_offset) == len(logprobs.top_logprobs)
        for own, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
            5 if choice.index < 2 else 3 :
        ]:
            assert own == max(top.values()), "greedy, to the bit"
    ids = client.completions.create(model="dense", prompt=[[40, 69], [40]], max_tokens=1)
    assert len(ids.choices) == 2


def test_chat(client):
    fields = dict(model="reduced", messages=HELLO, seed=2, extra_body={"ignore_eos": True})
    answer = client.chat.completions.create(
        **fields, max_completion_tokens=7, logprobs=True, top_logprobs=2, n=2
    )
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert [c.index for c in answer.choices] == [0, 1]
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert bytes(b for e in choice.logprobs.content for b in e.bytes).decode() == choice.message.content
    assert [len(e.top_logprobs) for e in choice.logprobs.content] == [2] * 7
    assert answer.usage.completion_tokens == 14
    assert answer.model_extra["lowkey"]["variant"] == "reduced"
    stream = list(client.chat.completions.create(**fields, max_tokens=7, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in stream) == choice.message.content
    assert stream[-1].choices[0].finish_reason == "length"


def test_the_stream_helper_of_chat(client):
    # It raises an exception of its own for an answer that was cut, so this one ends by itself.
    fields = {"max_tokens": 500, "temperature": 1, "seed": 1}
    whole = client.chat.completions.create(model="dense", messages=HELLO, **fields)
    assert whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model="dense", messages=HELLO, **fields) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert len(events) > 1 and final.choices[0].message.role == "assistant"
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_async(server):
    async def work():
        async with asynchronous(server) as client:
            fields = dict(model="reduced", prompt="Hi", max_tokens=8, seed=5, extra_body={"ignore_eos": True})

            async def streamed():
                stream = await client.completions.create(**fields, stream=True)
                return "".join([c.choices[0].text async for c in stream])

            whole, *texts = await asyncio.gather(
                client.completions.create(**fields), *(streamed() for _ in range(5))
            )
            assert texts == [whole.choices[0].text] * 5
            chat = await client.chat.completions.create(model="dense", messages=HELLO, max_tokens=3)
            assert chat.choices[0].message.content is not None

    asyncio.run(work())


def test_leaving_a_stream_early_frees_every_slot(server):
    async def work():
        async with asynchronous(server) as client:
            stream = await client.completions.create(
                model="dense",
                prompt=["a", "b"],
                n=3,
                max_tokens=ENDLESS,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                break
            await stream.close()

    ended = {"variant": "dense", "endpoint": "completions", "finish_reason": "abort"}
    before = server.sample("lowkey_requests_total", **ended)
    asyncio.run(work())
    server.wait_idle()
    poll(lambda: server.sample("lowkey_requests_total", **ended) == before + 6, "all six are aborted")


def test_giving_up_on_an_answer_frees_every_slot(server):
    ended = {"variant": "dense", "endpoint": "chat", "finish_reason": "abort"}
    before = server.sample("lowkey_requests_total", **ended)

    async def work():
        async with asynchronous(server) as client:
            asked = asyncio.create_task(
                client.chat.completions.create(
                    model="dense", messages=HELLO, n=4, max_tokens=ENDLESS, extra_body={"ignore_eos": True}
                )
            )
            used = dict(variant="dense", engine="0", state="used")
            await asyncio.to_thread(
                poll, lambda: server.sample("lowkey_state_slots", **used) == 4, "all four run"
            )
            asked.cancel()
            await asyncio.wait([asked])
            assert asked.cancelled()

    asyncio.run(work())
    server.wait_idle()
    poll(lambda: server.sample("lowkey_requests_total", **ended) == before + 4, "all four are aborted")


def test_errors_are_its_own_types(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="dense", prompt="x", max_tokens=0)
    assert bad.value.param == "max_tokens" and int(bad.value.code) == 400
    assert bad.value.type == "invalid_request_error" and "max_tokens" in bad.value.body["message"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.param == "model" and "dense, reduced" in str(missing.value)
    with pytest.raises(openai.BadRequestError):
        list(client.completions.create(model="dense", prompt="", stream=True))
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model="dense", messages=HELLO, response_format={"type": "structural_tag"}
        )
    assert bad.value.param == "response_format"
    state = client.post("/states", body={"model": "dense", "prompt": "x"}, cast_to=object)
    with pytest.raises(openai.ConflictError) as conflict:
        client.completions.create(
            model="reduced", prompt="y", max_tokens=1, extra_body={"state_id": state["id"]}
        )
    assert conflict.value.param == "state_id"


def test_models(client, checkpoints):
    models = {m.id: m for m in client.models.list()}
    assert list(models) == ["dense", "reduced"]
    assert models["dense"].owned_by == "lowkey"
    assert client.models.retrieve("reduced").model_extra["root"] == str(checkpoints["reduced"])
