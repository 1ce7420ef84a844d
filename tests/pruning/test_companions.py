"""What comes along of a checkpoint beside its weights: over links, from a hub, and what the user is told is missing."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import GATED, write_checkpoint
from hub import COMMIT, hub_of
from typer.testing import CliRunner

import pruning.commands.prune
from modeling.sources import check_source
from pruning.cli import app

PRUNE = ("--method", "l1", "--keep", "16")
OTHERS = ["LICENSE", "README.md", "chat_template.jinja", "generation_config.json"]
LEFT_OUT = "note: left out, because they are links to folders, to other places or to nothing"
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def prune(tmp_path, monkeypatch):
    """Prunes; returns the files that came along, by their names in the source, and the notes."""
    monkeypatch.setenv("COLUMNS", "200")

    def prune(source, out="out"):
        result = CliRunner().invoke(app, ["prune", str(source), str(tmp_path / out), *PRUNE])
        assert result.exit_code == 0, result.output + repr(result.exception)
        written = {"README.md", "config.json", "model.safetensors", "state_reduction.json"}
        files = {str(p.relative_to(tmp_path / out)) for p in (tmp_path / out).rglob("*") if not p.is_dir()}
        assert not any(p.is_symlink() for p in (tmp_path / out).rglob("*"))
        came = {"README.md" if file == "README.source.md" else file for file in files - written}
        return sorted(came), [x for x in result.stderr.splitlines() if x.startswith("note: ")]

    return prune


def whole(path):
    """A checkpoint with other files than weights and tokenizer."""
    write_checkpoint(path, GATED)
    for name in OTHERS:
        (path / name).write_text("{}" if name.endswith(".json") else name)
    return path


def test_a_directory_of_links_is_as_good_as_the_one_that_they_lead_to(tmp_path, prune):
    real = whole(tmp_path / "real")
    (real / "assets").mkdir()
    (real / "assets/picture.png").write_bytes(b"png")
    links = tmp_path / "links"
    (links / "assets").mkdir(parents=True)
    for path in real.rglob("*"):
        if path.is_file():
            (links / path.relative_to(real)).symlink_to(path)
    came, notes = prune(links)
    assert came == sorted([*OTHERS, *TOKENIZER, "assets/picture.png"])
    assert notes == [f"note: copied over links to where the weights are: {', '.join(came)}"]
    assert prune(real, "direct") == (came, [])
    check_source(str(tmp_path / "out"))


@pytest.mark.parametrize("store", ["flat", "spread"])
def test_a_hub_cache_whose_blobs_are_links_into_a_shared_store(tmp_path, prune, store):
    real = whole(tmp_path / "real")
    cache = tmp_path / "hub/models--org--name"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in sorted(real.iterdir()):
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        kept = tmp_path / "store" / (name[:2] if store == "spread" else "") / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        path.rename(kept)
        (cache / "blobs" / name).symlink_to(kept)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    came, notes = prune(snapshot)
    assert came == sorted([*OTHERS, *TOKENIZER]) and not notes
    check_source(str(tmp_path / "out"))


def test_blobs_elsewhere_that_a_directory_of_links_was_made_of(tmp_path, prune):
    """As `huggingface-cli` with a `--local-dir` of links, or a content-addressed store, leaves it."""
    real, links, blobs = whole(tmp_path / "real"), tmp_path / "links", tmp_path / "blobs"
    links.mkdir()
    blobs.mkdir()
    for i, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / f"{i}")
        (links / path.name).symlink_to(blobs / f"{i}")
    came, notes = prune(links)
    assert came == sorted([*OTHERS, *TOKENIZER])
    assert notes == [f"note: copied over links to where the weights are: {', '.join(came)}"]


def secrets(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("secret.txt", ".netrc", "tokenizer.json"):
        (folder / name).write_text("secret")
    return folder


def test_what_links_elsewhere_is_left_out_and_named(tmp_path, prune):
    home, real = secrets(tmp_path), whole(tmp_path / "real")
    (real / "leak.txt").symlink_to(home / "secret.txt")
    (real / "over.txt").symlink_to(real / "leak.txt")
    (real / "folder").symlink_to(home)
    (real / "gone.txt").symlink_to(tmp_path / "nowhere")
    (real / "loop.txt").symlink_to(real / "loop.txt")
    (real / "up.txt").symlink_to("..")
    (real / "inside.txt").symlink_to("LICENSE")
    (real / ".git").mkdir()
    (real / ".git/config").write_text("token")
    (real / "token.txt").symlink_to(".git/config")
    came, [note] = prune(real)
    assert came == sorted([*OTHERS, *TOKENIZER, "inside.txt"])
    named = "folder, gone.txt, leak.txt, loop.txt, over.txt, token.txt, up.txt"
    assert note == f"{LEFT_OUT}: {named}"


def test_weights_that_are_links_open_their_own_folder_and_no_other(tmp_path, prune):
    home, real, links = secrets(tmp_path), whole(tmp_path / "real"), tmp_path / "links"
    (real / ".hidden").write_text("secret")
    (real / "below").mkdir()
    (real / "below/deep.txt").write_text("secret")
    links.mkdir()
    for name in ("config.json", "model.safetensors", *TOKENIZER, "LICENSE"):
        (links / name).symlink_to(real / name)
    (links / "leak.txt").symlink_to(home / "secret.txt")
    (links / "netrc.txt").symlink_to(real / ".hidden")
    (links / "deep.txt").symlink_to(real / "below/deep.txt")
    (links / "NOTICE").symlink_to(real / "README.md")
    came, notes = prune(links)
    assert came == sorted(["LICENSE", *TOKENIZER])
    assert notes == [
        f"note: copied over links to where the weights are: {', '.join(came)}",
        f"{LEFT_OUT}: NOTICE, deep.txt, leak.txt, netrc.txt",
    ]


def test_weights_that_pass_through_a_link_of_the_checkpoint_open_nothing_more(tmp_path, prune):
    """The checkpoint's own folder is one that its weights come through; a link in it may lead anywhere."""
    home, real, links = secrets(tmp_path), whole(tmp_path / "real"), tmp_path / "links"
    shutil.copytree(real, links)
    (links / "model.safetensors").unlink()
    (links / "weights").symlink_to(real / "model.safetensors")
    (links / "model.safetensors").symlink_to("weights")
    (links / "leak.txt").symlink_to("leak")
    (links / "leak").symlink_to(home / "secret.txt")
    came, [note] = prune(links)
    assert "leak.txt" not in came and note.endswith(" or to nothing: leak, leak.txt, weights")


@pytest.mark.parametrize("way", ["a hidden folder", "blobs that came along", "a name like a hash"])
def test_a_link_on_the_way_may_be_a_strangers_work_too(tmp_path, prune, way):
    """A tar or a git clone brings its links with it: where a file lies in the end is what counts."""
    home, path = secrets(tmp_path), whole(tmp_path / "cache/snapshots" / COMMIT)
    hop = {
        "a hidden folder": path / ".store/leak",
        "blobs that came along": tmp_path / "cache/blobs/leak",
        "a name like a hash": tmp_path / "cache/blobs" / COMMIT,
    }[way]
    hop.parent.mkdir()
    hop.symlink_to(home / "secret.txt")
    (path / "leak.txt").symlink_to(hop)
    (path / "model.safetensors").rename(hop.parent / "weights")
    (path / "model.safetensors").symlink_to(hop.parent / "weights")
    came, [note] = prune(path)
    assert came == sorted([*OTHERS, *TOKENIZER]) and note.endswith(" or to nothing: leak.txt")


def test_what_cannot_be_read_is_found_before_the_work(tmp_path, monkeypatch):
    real = whole(tmp_path / "real")
    asked = Path.open

    def failing(self, *args, **kwargs):
        if self.name == "LICENSE":
            raise PermissionError(13, "Permission denied")
        return asked(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)  # root may read everything
    monkeypatch.setattr(pruning.commands.prune, "select", lambda *a, **k: pytest.fail("work began"))
    result = CliRunner().invoke(app, ["prune", str(real), str(tmp_path / "out"), *PRUNE])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert result.stderr.endswith(f"error: {real / 'LICENSE'} can't be read: Permission denied\n")


def test_a_tokenizer_that_is_left_out_is_told_with_what_follows(tmp_path, prune):
    real = whole(tmp_path / "real")
    (tmp_path / "home").mkdir()
    (real / "tokenizer.json").rename(tmp_path / "home/tokenizer.json")
    (real / "tokenizer.json").symlink_to(tmp_path / "home/tokenizer.json")
    came, notes = prune(real)
    assert came == sorted([*OTHERS, "tokenizer_config.json"])
    first, second = notes
    assert first == f"{LEFT_OUT}: tokenizer.json"
    assert second == (
        f"note: tokenizer.json of {real} is a link out of the checkpoint, so the output has none: lowkey-serve refuses "
        "it until one is put there"
    )


def test_earlier_results_in_the_source_stay_behind(tmp_path, prune):
    real = whole(tmp_path / "real")
    prune(real, "real/reduced")
    (real / "assets").mkdir()
    (real / "assets/picture.png").write_bytes(b"png")
    came, notes = prune(real)
    assert came == sorted([*OTHERS, *TOKENIZER, "assets/picture.png"]) and not notes


# From a hub


@pytest.fixture(scope="module")
def from_hub(tmp_path_factory):
    """A checkpoint with code of its own, pruned from a hub by a real process: its result and what it said."""
    folder = tmp_path_factory.mktemp("hub")
    auto_map = {
        "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        "AutoConfig": "org/other--configuration_x.XConfig",
    }
    path = whole(folder / "repository")
    (path / "config.json").write_text(json.dumps({**GATED, "auto_map": auto_map}))
    slow = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": slow}))
    for name in ("modeling_x.py", "tokenization_x.py", "setup.py"):
        (path / name).write_text("raise SystemExit('remote code was run')")
    for name in ("NOTICE.txt", "USE_POLICY.md", "pytorch_model.bin", ".gitattributes"):
        (path / name).write_text(name)
    with hub_of("org/name", path) as address:
        environment = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "COLUMNS": "200",
        }
        command = [
            Path(sys.executable).with_name("lowkey-prune"),
            "prune",
            "org/name@main",
            folder / "out",
            *PRUNE,
        ]
        ran = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=300
        )
    assert ran.returncode == 0, ran.stderr
    return folder / "out", ran.stderr, folder / "home"


def test_licence_and_card_come_from_a_hub_and_code_does_not(from_hub):
    out, _, home = from_hub
    files = {p.name for p in out.iterdir()}
    expected = {*OTHERS, *TOKENIZER, "NOTICE.txt", "USE_POLICY.md", "README.source.md"}
    assert files == {"config.json", "model.safetensors", "state_reduction.json", *expected}
    for name, source in (("LICENSE", "LICENSE"), ("README.source.md", "README.md")):
        assert (out / name).read_text() == source
    assert 'base_model: "org/' in (out / "README.md").read_text()
    assert not [*home.rglob("*.py")], "code was downloaded"
    check_source(str(out))


def test_what_names_code_that_is_not_there_loses_it_and_says_so(from_hub):
    out, said, _ = from_hub
    config, tokenizer = (
        json.loads((out / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert "auto_map" not in config and config["model_type"] == "gated_deltanet" and config["head_dim"] == 16
    assert tokenizer == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    without = "is written without its auto_map: the Python files that it names are not in the checkpoint"
    assert f"note: config.json {without} (modeling_x.py, org/other--configuration_x.py)\n" in said
    assert f"note: tokenizer_config.json {without} (tokenization_x.py)\n" in said


def test_code_that_the_cache_holds_stays_there(tmp_path, prune):
    """transformers leaves it in the snapshot when it is told to trust it."""
    path = whole(tmp_path / "cache/snapshots" / COMMIT)
    auto_map = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (path / "config.json").write_text(json.dumps({**GATED, "auto_map": auto_map}))
    (path / "modeling_x.py").write_text("raise SystemExit('remote code was run')")
    came, [note] = prune(path)
    assert came == sorted([*OTHERS, *TOKENIZER]) and note.startswith(
        "note: config.json is written without its auto_map"
    )


@pytest.mark.parametrize("there", [True, False])
def test_code_that_is_there_stays_named(tmp_path, prune, there):
    path = whole(tmp_path / "local")
    auto_map = {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (path / "config.json").write_text(json.dumps({**GATED, "auto_map": auto_map}))
    if there:
        (path / "modeling_x.py").write_text("raise SystemExit('remote code was run')")
    came, notes = prune(path)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config.get("auto_map") == auto_map, "modeling_x.py" in came, not notes) == (there, there, there)


@pytest.mark.parametrize(
    "odd", ["text", 7, [], {"AutoModel": 5}, {"AutoModel": {"a": "b"}}, [[["x"]]], None, {}]
)
def test_an_auto_map_that_is_none_is_no_traceback(tmp_path, prune, odd):
    path = whole(tmp_path / "local")
    (path / "config.json").write_text(json.dumps({**GATED, "auto_map": odd}))
    _, notes = prune(path)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert ("auto_map" in config) == (odd in (None, {}, [])) == (not notes)


def test_a_config_that_is_no_json_is_copied_as_it_is(tmp_path, prune):
    path = whole(tmp_path / "local")
    (path / "processor_config.json").write_text("{no json")
    came, _ = prune(path)
    assert "processor_config.json" in came
    assert (tmp_path / "out/processor_config.json").read_text() == "{no json"
