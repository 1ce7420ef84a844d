"""Small inputs for each command of `lowkey-prune`, and the arguments that run it on them in seconds."""

import subprocess
import sys

from checkpoints import GATED, write_checkpoint
from typer.testing import CliRunner

from pruning.cli import app

TEXT = ("--tokens", 256, "--window-length", 64)
RECOVER = ("--tokens", 200, "--window-length", 32, "--batch", 2, "--heldout-tokens", 512, "--evaluations", 1)
SWEEP = (
    "--method",
    "l1",
    "--per-layer",
    "l1",
    "--width",
    16,
    "--align",
    16,
    "--seed",
    0,
    "--heldout-tokens",
    1024,
)
EVALUATE = ("--tokens", 512, "--window", 64)


def arguments(made, command, out):
    """Arguments of a command that writes `out`, its inputs from `made`."""
    dense, reduced, text = made / "dense", made / "reduced", ("--text", made / "text")
    return {
        "calibrate": ("calibrate", dense, out, *text, *TEXT),
        "merge": ("merge", made / "s.safetensors", "--out", out),
        "prune": ("prune", dense, out, "--method", "l1", "--keep", 8),
        "prune with statistics": ("prune", dense, out, "--method", "drrqr", "--keep", 8, *text, *TEXT),
        "recover": ("recover", dense, reduced, out, *text, "--heldout", made / "text", *RECOVER),
        "evaluate": ("evaluate", dense, reduced, *text, *EVALUATE, "--json", out),
        "sweep": ("sweep", dense, out, *text, "--heldout", made / "text", *SWEEP, *TEXT),
        "report": ("report", out, reduced),
        "inspect": ("inspect", dense),
    }[command]  # fmt: skip


def invoke(*given):
    """The command in this process."""
    return CliRunner().invoke(app, [*map(str, given)])


def make_inputs(folder):
    """A dense checkpoint, a reduced one, statistics, and text."""
    write_checkpoint(folder / "dense", GATED)
    (folder / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    for command, out in (("prune", "reduced"), ("calibrate", "s.safetensors")):
        assert invoke(*arguments(folder, command, folder / out)).exit_code == 0
    return folder


MEASURED = """
import re, sys
from pathlib import Path
from pruning.cli import app

def peak():  # of this process's own memory; getrusage counts what its parent held when it was forked
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

base = peak()
app(sys.argv[1:], standalone_mode=False)
print(base, peak())
"""


def peak_of(*given):
    """Bytes that a process of `lowkey-prune` holds before the command and at most, and the process that is done."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, given)], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    base, peak = (int(n) for n in done.stdout.split()[-2:])
    return base, peak, done
