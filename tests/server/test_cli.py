"""`lowkey-serve`: arguments, environment, and errors that say what would be right."""

import asyncio
import gc
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from server import cli
from server.front_end import FrontEnd
from server.settings import ConfigurationError, Settings


@pytest.fixture
def run(monkeypatch):
    """Runs the command without a server: (result, settings that it would have served)."""
    served = []
    monkeypatch.setattr(cli, "run", lambda settings, reload: served.append(settings))

    def invoke(*arguments, **environment):
        served.clear()
        result = CliRunner().invoke(cli.app, list(arguments), env=environment)
        return result, served[0] if served else None

    return invoke


@pytest.fixture
def model(tmp_path):
    """A directory that holds the files of a checkpoint."""
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).touch()
    return tmp_path


def test_variants_keep_their_order(run, model):
    result, settings = run(f"reduced={model}", "dense=org/name@v1", "--port", "0", "--max-requests", "3")
    assert result.exit_code == 0, result.output
    sources = [(name, variant.source) for name, variant in settings.variants.items()]
    assert sources == [("reduced", str(model)), ("dense", "org/name@v1")]
    assert (settings.port, settings.max_requests, settings.max_queue) == (0, 3, 256)


def test_the_environment_counts_where_the_command_line_is_silent(run, model):
    environment = {"LOWKEY_PORT": "9", "LOWKEY_MAX_QUEUE": "7", "LOWKEY_DRAIN_S": "2.5"}
    _, settings = run(f"a={model}", "--port", "10", **environment)
    assert (settings.port, settings.max_queue, settings.drain_s) == (10, 7, 2.5)
    _, settings = run(LOWKEY_VARIANTS=f'{{"a": "{model}"}}')
    assert settings.variants["a"].source == str(model)


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        ([], "no model to serve"),
        (["demo/model"], "name=PATH_OR_HUB_ID"),
        (["=x"], "name=PATH_OR_HUB_ID"),
        (["dense="], "name=PATH_OR_HUB_ID"),
        (["dense=/no/such/place"], "no such directory"),
        (["dense=nowhere"], "no such directory"),
        (["a=org/x", "a=org/y"], "twice"),
        (["a b=org/x"], "a b"),
        (["a=org/x", "--port", "99999"], "port"),
        (["a=org/x", "--prefill-tokens", "100"], "multiple of 64"),
        (["a=org/x", "--device", "tpu"], "device"),
        (["a=org/x", "--dtype", "int8"], "dtype"),
        (["a=org/x", "--state-dtype", "fp8"], "state_dtype: Input should be 'float32', 'bfloat16' or 'int8'"),
        (["a=org/x", "--max-requests", "0"], "max_requests"),
        (["a=org/x", "--context-tokens", "0"], "context_tokens: Input should be greater than or equal to 1"),
        (["a=org/x", "--nonsense"], "nonsense"),
    ],
    ids=lambda x: " ".join(x)[:30] if isinstance(x, list) else None,
)
def test_bad_usage_exits_with_2(run, arguments, mention):
    result, settings = run(*arguments)
    assert result.exit_code == 2 and settings is None
    assert mention in " ".join(result.output.replace("│", " ").split())


def test_help_has_examples(run):
    result, _ = run("--help")
    assert result.exit_code == 0 and "lowkey-serve dense=" in result.output


def test_every_setting_is_documented():
    assert all(field.description for field in Settings.model_fields.values())


@pytest.fixture
def frozen():
    """How many objects the garbage collector leaves alone, over those before."""
    before = gc.get_freeze_count()
    yield lambda: gc.get_freeze_count() - before
    gc.unfreeze()


def test_what_is_there_once_all_models_are_up_is_no_garbage(frozen):
    variants = [SimpleNamespace(loaded=True), SimpleNamespace(loaded=False)]
    service = SimpleNamespace(variants=variants, settings=Settings())
    server = FrontEnd(SimpleNamespace(state=SimpleNamespace(service=service)))
    asyncio.run(server.on_tick(1))
    assert frozen() == 0
    variants[1].loaded = True
    asyncio.run(server.on_tick(1))
    after = frozen()
    assert after > 1000
    asyncio.run(server.on_tick(1))
    assert frozen() == after


def test_what_turns_out_bad_at_the_start_exits_with_2_too(monkeypatch):
    def refuse(*_):
        raise ConfigurationError("state_dir: no file can be made in it")

    monkeypatch.setattr(cli, "run", refuse)
    result = CliRunner().invoke(cli.app, ["dense=org/name"])
    assert result.exit_code == 2 and "state_dir" in result.output
