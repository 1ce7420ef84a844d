"""Every Triton kernel is one that the compiler takes, not only the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [[], pytest.param(["--every"], marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_a_gpu(tmp_path, options):
    result = subprocess.run(
        [sys.executable, SCRIPT, *options],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    compiled = dict(line.split() for line in result.stdout.splitlines())
    assert set(compiled) == {
        *("attend_packed", "attend_step", "join_splits", "prepare_heads"),
        *("combine", "experts_in", "experts_out", "few_in", "few_out", "few_scores", "route"),
        *("convolve_packed", "convolve_step", "gated_norm", "gates", "mixer_step", "move_states_on"),
        *("narrow_rows", "one_row", "prepare", "rms_norm", "swiglu", "widen_rows"),
    }
    assert all(int(size) > 1000 for size in compiled.values())
