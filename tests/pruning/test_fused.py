"""Training by fla's kernels: on a CPU plain torch, and by Triton's interpreter what plain torch gives."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pruning.fused import CONFIGS, training_rule

SUPPORT = Path(__file__).parents[1] / "support"


def test_a_cpu_trains_in_plain_torch():
    assert training_rule(torch.device("cpu")) is None


def fla_folder() -> Path:
    spec = importlib.util.find_spec("fla")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fla-core is not installed (extra gpu)")
    return Path(spec.submodule_search_locations[0])


def test_the_configurations_are_of_kernels_that_fla_has():
    sources = "\n".join(file.read_text() for file in fla_folder().rglob("*.py"))
    assert [name for name in CONFIGS if f"def {name}(" not in sources] == []


@pytest.mark.slow
def test_the_fused_forward_and_its_gradients_are_those_of_plain_torch(tmp_path):
    shutil.copytree(fla_folder(), tmp_path / "fla")
    # The interpreter counts loops in plain integers, which have no method for a cast.
    kernel = tmp_path / "fla" / "ops" / "common" / "chunk_delta_h.py"
    kernel.write_text(kernel.read_text().replace("i_t.to(tl.int64)", "i_t"))
    done = subprocess.run(
        [sys.executable, SUPPORT / "interpret_fused.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {tuple(line.split()[:2]): float(line.split()[2]) for line in done.stdout.splitlines()}
    assert len(found) == 8
    # That of A_log is a small difference of large sums.
    assert max(found.values()) < 1e-4, found
