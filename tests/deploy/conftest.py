"""Where the tools that check images and chart live: they are too large for our own environment."""

import json
import subprocess
from pathlib import Path

import pytest

BIN = Path(__file__).parents[2] / ".cache" / "deploy-venv" / "bin"
TOOLS = Path(__file__).parent / "tools.py"


@pytest.fixture(scope="session")
def tools():
    """Folder of the tools' commands."""
    if not (BIN.parent / ".installed").exists():
        pytest.fail("the tools are not installed; run `make deploy-check`")
    return BIN


@pytest.fixture(scope="session")
def check(tools):
    """What tools.py says: check("chart", directory, given=text) and the like."""

    def run(*arguments, given):
        done = subprocess.run(
            [tools / "python", TOOLS, *arguments], input=given, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
