"""What counts as a variant's traffic: completions and chat do, comparisons don't."""

import pytest
from scripted import SCRIPTS, scripted_api


@pytest.fixture
def api(tmp_path, monkeypatch):
    SCRIPTS.clear()
    with scripted_api(tmp_path, monkeypatch) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "asked", "ended"),
    [
        ("/v1/completions", {"model": "dense", "prompt": "Hi", "n": 2}, ["completions"] * 2),
        (
            "/v1/chat/completions",
            {"model": "dense", "messages": [{"role": "user", "content": "Hi"}]},
            ["chat"],
        ),
        ("/v1/compare", {"prompt": "Hi"}, []),
    ],
)
def test_observers_are_told_of_traffic_only(api, path, asked, ended):
    told = []
    api.app.state.observers.append(lambda generation: told.append(generation.origin.endpoint))
    api.post(path, json={**asked, "max_tokens": 3}).raise_for_status()
    assert told == ended
    requests = api.get("/v1/ab/summary").json()["variants"]["dense"]["requests"]
    assert requests == len(ended)
