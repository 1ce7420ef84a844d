"""Kernels compiled ahead, on a machine without a GPU, by a script that pretends one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the script prints, by the first word of each line, and what it logs."""
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}",
    }
    result = subprocess.run(
        [sys.executable, SUPPORT / "compile_ahead.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    return {first: rest for first, *rest in lines}, result.stderr


FLA = [
    "chunk_fwd_kernel_o",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
    "chunk_local_cumsum_scalar_kernel",
    "recompute_w_u_fwd_kernel",
]


def test_fla_would_tune_what_was_measured(said):
    assert {name.partition("=")[0] for name in said[0]["tuned"]} == set(FLA)
    assert all(int(name.partition("=")[2]) > 1 for name in said[0]["tuned"])


def test_each_kernel_of_a_model_is_compiled_once_and_launched_never(said):
    ours = ["convolve_packed", "gated_norm", "gates", "mixer_step", "rms_norm", "swiglu"]
    assert said[0]["compiled"] == sorted([*FLA, *ours])
    assert said[0]["again"] == [], "they are kept"
    assert "11 kernels are ready after" in said[1]


def test_no_two_threads_parse_at_once(said):
    """Python 3.11 before 3.11.9 may then raise a SystemError, and kernels would be compiled one by one."""
    assert said[0]["together"] == []


def test_all_configurations_of_a_kernel_that_is_tuned_are_compiled(said):
    assert len(said[0]["more"]) == 1, "the one of two that is new"


def test_a_configuration_that_fla_does_not_have_leaves_the_kernel_to_its_tuning(said):
    assert said[0]["other"] == ["chunk_fwd_kernel_o"]
    assert "no chunk_local_cumsum_scalar_kernel with {'num_warps': 99}: it is tuned" in said[1]


def test_a_kernel_that_does_not_compile_says_so_when_it_is_launched(said):
    assert said[0]["launched"] == ["CompilationError"]


def test_our_launches_of_fla_s_kernels_are_fla_s_own():
    result = subprocess.run(
        [sys.executable, SUPPORT / "fla_launches.py"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{SUPPORT}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert [sorted(line.split()) for line in lines[:3]] == [FLA] * 3
    assert lines[3:] == [
        "refused: q, k and v must have one dtype, got torch.float32, torch.bfloat16 and torch.bfloat16",
        "refused: beta and g must be float32, got torch.float32, torch.bfloat16",
        "refused: q, k, v, beta, g and the state must be contiguous",
        "refused: fla's kernels take a d_k of at most 256, got 257",
    ]


def test_an_engine_imports_neither_models_of_fla_nor_the_compiler_of_torch():
    """Each takes seconds of every start. The extra `gpu` installs fla without its models."""
    code = (
        "import sys; sys.modules['fla.layers'] = sys.modules['fla.models'] = None\n"
        "import server.engine.process, modeling.runtime.gpu.fla_rule\n"
        "assert not {'torch._dynamo', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-2000:]
