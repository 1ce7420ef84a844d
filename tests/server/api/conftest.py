"""The API over two scripted variants, for tests that want no settings of their own."""

import pytest
from scripted import SCRIPTS, scripted_api


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        with scripted_api(tmp_path_factory.mktemp("api"), patch) as client:
            yield client


@pytest.fixture
def script(api):
    script = SCRIPTS["dense"]
    script.seen.clear()
    yield script
    script.queue.clear()
