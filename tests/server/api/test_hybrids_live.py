"""Real engines of hybrids, dense and reduced, over HTTP: what is said of pages is what was held."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hybrid_cases import CASES
from hybrids import write_hybrid
from live_server import LiveServer
from reducing import random_keep, reduce

from modeling.checkpoint import open_checkpoint
from modeling.spec import FLOAT32_STATES

CASE = CASES["text-dense-tied"]
SLOTS, PAGES_EACH = 8, 2
PAGE = 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hybrids")
    dense = open_checkpoint(write_hybrid(directory / "dense", CASE))
    half = tuple(d_k // 2 for d_k in dense.spec.d_k)
    reduce(dense, random_keep(dense.spec, half), directory / "reduced")
    return {name: directory / name for name in ("dense", "reduced")}


@pytest.fixture(scope="module")
def live(checkpoints, tmp_path_factory):
    """Eight requests at once in each variant, with two pages for each of them on the average, and logits that do not
    depend on what else runs."""
    directory = tmp_path_factory.mktemp("live")
    server = LiveServer(
        directory / "log",
        *(f"{name}={path}" for name, path in checkpoints.items()),
        *("--device", "cpu", "--max-requests", str(SLOTS), "--context-tokens", str(PAGES_EACH * PAGE)),
        "--batch-invariant",
        LOWKEY_STATE_DIR=str(directory / "states"),
    )
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture
def specs(checkpoints):
    return {name: open_checkpoint(path).spec for name, path in checkpoints.items()}


def held(spec, tokens):
    """Bytes of a request's state, its pages whole."""
    return spec.state_bytes(-(-tokens // PAGE) * PAGE)


@pytest.mark.parametrize("model", ["dense", "reduced"])
def test_an_answer_says_what_its_request_held(live, specs, model):
    spec = specs[model]
    for prompt, tokens in ((1, 1), (60, 4), (60, 5), (60, 6), (128, 1), (129, 2), (100, 100)):
        told = live.complete(model=model, prompt=[5] * prompt, max_tokens=tokens)["lowkey"]
        # The last token that was sampled is not fed any more; an engine may have had a page for it.
        least, most = held(spec, prompt + tokens - 1), held(spec, prompt + tokens)
        assert least <= told["state_bytes"] <= most, (prompt, tokens)
        assert told["recurrent_bytes"] + told["conv_bytes"] == spec.state_bytes(0)
        assert told["kv_bytes"] == told["state_bytes"] - spec.state_bytes(0)
    conv = sum(mixer.state_tensors(FLOAT32_STATES)["conv"].nbytes for mixer in spec.deltas.values())
    assert told["conv_bytes"] == conv


def test_models_say_slots_pages_and_the_longest_request(live, specs):
    for model, spec in specs.items():
        told = live.http.get(f"/v1/models/{model}").json()["lowkey"]
        assert (told["slots"], told["pages"]) == (SLOTS, SLOTS * PAGES_EACH)
        assert told["kv_bytes_per_token"] == spec.kv_bytes_per_token()
        assert told["context_length"] == min(spec.context_length, SLOTS * PAGES_EACH * PAGE)
        pages = (told["pages"] + 1) * told["kv_bytes_per_page"]
        assert told["memory"]["pages"] == pages and told["memory"]["states"] == 9 * spec.state_bytes(0)
        body = {"model": model, "prompt": [5] * 10, "max_tokens": told["context_length"]}
        answer = live.http.post("/v1/completions", json=body)
        assert answer.status_code == 400 and f"{told['context_length']} tokens" in answer.text
    assert "if the model were not reduced" in live.log.read_text()


def test_a_comparison_counts_keys_and_values(live, specs):
    body = {"prompt": [5] * 100, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    answer = live.http.post("/v1/compare", json=body).json()
    base, other = (result["lowkey"]["state_bytes"] for result in answer["results"])
    assert (base, other) == (held(specs["dense"], 159), held(specs["reduced"], 159))
    assert answer["results"][1]["against_baseline"]["state_bytes_ratio"] == pytest.approx(other / base)


@pytest.mark.parametrize("model", ["dense", "reduced"])
def test_a_saved_state_goes_out_comes_in_and_goes_on(live, specs, model):
    spec, prompt, rest = specs[model], [5 + i % 90 for i in range(130)], [7, 8, 9]
    state = live.http.post("/v1/states", json={"model": model, "prompt": prompt}).json()
    assert 0 < state["bytes"] - spec.state_bytes(130) < 4096, "its last page is not padded"
    data = live.http.get(f"/v1/states/{state['id']}/content").content
    again = live.http.post("/v1/states/import", content=data).json()
    assert (again["variant"], again["tokens"]) == (model, 130)
    fields = dict(model=model, max_tokens=20, temperature=0)
    whole = live.complete(**fields, prompt=prompt + rest)
    for state_id in (state["id"], again["id"]):
        gone_on = live.complete(**fields, prompt=rest, state_id=state_id)
        assert gone_on["choices"][0]["text"] == whole["choices"][0]["text"]
        assert gone_on["lowkey"]["kv_bytes"] == whole["lowkey"]["kv_bytes"]
        assert gone_on["usage"]["prompt_tokens"] == 133


def test_more_requests_than_pages_end_with_the_texts_of_a_free_engine(live):
    """Eight requests of five pages each in the sixteen that there are."""
    fields = dict(temperature=0, max_tokens=250)
    prompts = [[5 + n] * 30 for n in range(SLOTS)]
    alone = [live.complete(prompt=prompt, **fields) for prompt in prompts]
    before = live.sample("lowkey_preemptions_total", variant="dense", engine="0")
    with ThreadPoolExecutor(SLOTS) as threads:
        together = list(threads.map(lambda prompt: live.complete(prompt=prompt, **fields), prompts))
    assert [a["choices"][0]["text"] for a in together] == [a["choices"][0]["text"] for a in alone]
    assert [a["lowkey"]["kv_bytes"] for a in together] == [a["lowkey"]["kv_bytes"] for a in alone]
    live.wait_idle("dense")
    labels = {"variant": "dense", "engine": "0"}
    assert live.sample("lowkey_preemptions_total", **labels) > before
    assert live.sample("lowkey_requests_preempted", **labels) == 0
    pages = {use: live.sample("lowkey_kv_pages", **labels, state=use) for use in ("used", "cached", "free")}
    assert pages["used"] == 0 and sum(pages.values()) == SLOTS * PAGES_EACH
