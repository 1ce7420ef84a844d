"""Every example of docs/pruning.md, one after the other in one folder, as a reader would run them."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = (
    ("--tokens 1000000", "--tokens 4096 --heldout-tokens 512 --evaluations 1"),
    ("--tokens 65536", "--tokens 8192"),
    ("--reconstruct ", "--reconstruct --reconstruct-tokens 2048 --reconstruct-steps 5 "),
    (
        "--device cuda",
        "--device cpu --width 64 --method l1 --per-layer l1 --seed 0 --heldout-tokens 512 --align 64",
    ),
)
"""What would take an hour, or a GPU, in small."""
ELSEWHERE = ("pip ", "lowkey-serve ", "fla-hub/")
"""Not run here: what needs a network, and the server, which has tests of its own."""


def examples():
    lines = [
        line for block in BLOCK.findall((ROOT / "docs/pruning.md").read_text()) for line in block.splitlines()
    ]
    commands = [line.removeprefix("$ ").partition(" #")[0] for line in lines]
    return [
        shlex.split(command)
        for command in commands
        if command.startswith("lowkey-prune ") and not any(word in command for word in ELSEWHERE)
    ]


def outputs(command):
    """The names that a command gives to new files and folders."""
    named = [command[i + 1] for i, word in enumerate(command) if word in ("--out", "--json", "--png")]
    position = {"prune": 3, "calibrate": 3, "sweep": 3, "recover": 4, "report": 2}.get(command[1])
    return named + ([] if position is None else [command[position]])


def test_no_example_writes_what_an_earlier_one_has_written():
    seen = set()
    commands = examples()
    assert len(commands) > 20
    for command in commands:
        if "--dry-run" in command:
            assert not seen & set(outputs(command)), command
            continue
        for name in outputs(command):
            assert name not in seen, command
            seen.add(name)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_examples_run_in_their_order(tmp_path):
    if not any(shutil.which(name) for name in ("chromium", "google-chrome")):
        pytest.skip("report --png needs a browser")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "my.txt").write_text("".join(f"def f{i}(x): return {i * i} + x\n" for i in range(600)))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in examples():
        line = shlex.join(command)
        for large, small in SMALLER:
            line = line.replace(large, small)
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800, check=False
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "recovered" / "recovery.json").exists() and list((tmp_path / "pictures").glob("*.png"))
