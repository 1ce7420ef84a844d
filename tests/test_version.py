"""One version, in the code: what is installed is told the same, and nothing needs to be installed."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import httpx
import pytest
from live_server import poll

from lowkey import __version__

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "demo" / "model"
PACKAGES = ("lowkey", "loadtest", "modeling", "pruning", "server")


def test_the_installed_package_is_of_the_version_in_the_code():
    assert importlib.metadata.version("lowkey") == __version__


@pytest.mark.parametrize("command", ["lowkey-serve", "lowkey-prune", "lowkey-loadtest"])
def test_every_command_says_its_version(command):
    done = subprocess.run(
        [Path(sys.executable).parent / command, "--version"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout) == (0, f"{command} {__version__}\n"), done.stderr


@pytest.fixture
def source_tree(tmp_path):
    """The environment of a process that finds all dependencies, and of this project only its source tree."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "lowkey" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}


def python(*arguments):
    """Without the environment's own site-packages."""
    return [sys.executable, "-S", "-P", *map(str, arguments)]


def test_the_server_starts_from_a_source_tree(source_tree, tmp_path):
    installed = "import importlib.metadata; importlib.metadata.version('lowkey')"
    done = subprocess.run(python("-c", installed), env=source_tree, capture_output=True, timeout=600)
    assert b"PackageNotFoundError" in done.stderr
    log = tmp_path / "log"
    with log.open("wb") as f:
        server = subprocess.Popen(
            python("-c", "from server.cli import app; app()", f"dense={MODEL}", "--port", "0"),
            env=source_tree,
            cwd=tmp_path,
            stdout=f,
            stderr=f,
        )
    try:
        found = poll(
            lambda: server.poll() is not None or re.search(r"running on (http://\S+)", log.read_text()),
            "a URL",
        )
        assert found is not True, log.read_text()
        assert httpx.get(f"{found[1]}/version", timeout=600).json() == {"version": __version__}
    finally:
        server.terminate()
        server.wait(600)


def test_a_reduction_from_a_source_tree_says_which_version_made_it(source_tree):
    code = "from pruning.versions import versions; print(versions()['lowkey'])"
    done = subprocess.run(python("-c", code), env=source_tree, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == __version__, done.stderr


def test_nothing_asks_for_metadata_of_what_may_not_be_installed():
    asking = [
        str(file.relative_to(ROOT))
        for folder in (*PACKAGES, "scripts", "benchmarks", "demo")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"importlib.metadata|pkg_resources", file.read_text())
    ]
    assert not asking


def test_nobody_is_told_to_install_what_somebody_else_may_publish():
    """Lowkey is on no package index: a command that names it takes whatever is registered there."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("needs a git checkout")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = "|".join(project["optional-dependencies"])
    named = re.compile(
        rf"pipx? (?:install|download)\s[^\n]*?(?<![\w/.-])lowkey(?![\w/-])|\blowkey\[(?:{extras})\]"
    )
    kinds = (
        ".md",
        ".py",
        ".toml",
        ".yaml",
        ".sh",
        ".txt",
        ".tpl",
        "Makefile",
        "Dockerfile",
        "Dockerfile.cpu",
    )
    files = [ROOT / name for name in done.stdout.splitlines() if name.endswith(kinds)]
    assert len(files) > 200
    telling = [
        f"{file}: {match[0]}"
        for file in files
        if file.exists() and file != Path(__file__)
        for match in named.finditer(file.read_text())
    ]
    assert not telling
