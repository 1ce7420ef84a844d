"""The plugin of vLLM: its kernel, run by Triton's interpreter, against plain torch in float64, and what it replaces,
against a stand-in for vLLM that has the same modules and functions."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from forked import forks

from modeling import vllm_plugin
from modeling.vllm_plugin import NORM_EPS, prepare_prefill

ROOT = Path(__file__).parents[2]
NAMES = ("q", "k", "v", "g", "beta")
WIDTHS = [(64, 128), (32, 128), (96, 192), (48, 192), (16, 128), (80, 128), (128, 128), (24, 128), (5, 3)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Arithmetic is in float32; the interpreter cuts bfloat16 off, a GPU rounds it."""


def draw(tokens, k_heads, v_heads, d_k, d_v, dtype=torch.float32):
    """Arguments of the preparation. The channels, a and b are slices of wider tensors, as in vLLM."""
    torch.manual_seed(tokens)
    width = 2 * k_heads * d_k + v_heads * d_v
    x = torch.randn(tokens, width + 7).to(dtype)[:, :width]
    b, a = (8 * torch.randn(tokens, 2 * v_heads)).to(dtype).chunk(2, 1)
    return x, a, b, torch.randn(v_heads), torch.randn(v_heads).to(dtype), k_heads, d_k, d_v


def reference(x, a, b, log_rate, shift, k_heads, d_k, d_v, normalise=True, exponentiate=False):
    """The same in float64."""
    q, k, v = x.double().split([k_heads * d_k, k_heads * d_k, len(log_rate) * d_v], dim=1)
    q, k, v = q.unflatten(1, (k_heads, d_k)), k.unflatten(1, (k_heads, d_k)), v.unflatten(1, (-1, d_v))
    if normalise:
        q, k = (y / (y.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() for y in (q, k))
    g = -log_rate.double().exp() * torch.nn.functional.softplus(a.double() + shift.double())
    return q, k, v, g.exp() if exponentiate else g, b.double().sigmoid()


def check(arguments, *options):
    dtype = arguments[0].dtype
    results = prepare_prefill(*arguments, *options)
    for name, ours, exact in zip(NAMES, results, reference(*arguments, *options), strict=True):
        assert ours.shape == exact.shape and ours.is_contiguous(), name
        assert ours.dtype == (torch.float32 if name in ("g", "beta") else dtype), name
        tolerance = TOLERANCE[ours.dtype]
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("d_k", "d_v"), WIDTHS)
def test_the_kernel_computes_what_float64_does(d_k, d_v):
    check(draw(37, 2, 2, d_k, d_v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k_heads", "v_heads"), [(1, 1), (2, 4), (1, 3), (3, 9)])
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_any_number_of_heads_and_tokens(tokens, k_heads, v_heads, dtype):
    check(draw(tokens, k_heads, v_heads, 12, 24, dtype))


@pytest.mark.parametrize(("normalise", "exponentiate"), [(False, False), (True, True)])
def test_the_options(normalise, exponentiate):
    check(draw(5, 1, 2, 8, 16), normalise, exponentiate)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # NumPy's, which the interpreter computes with
def test_a_token_of_zeros_and_gates_far_out_stay_finite():
    x, _, b, *others = draw(3, 1, 2, 8, 16)
    arguments = (torch.zeros_like(x), torch.tensor([[-300.0, 300.0]] * 3), b * 1e3, *others)
    assert all(result.isfinite().all() for result in prepare_prefill(*arguments))
    check(arguments)


def test_no_tokens():
    results = prepare_prefill(*draw(0, 2, 4, 8, 16))
    assert [tuple(r.shape) for r in results] == [(0, 2, 8), (0, 2, 8), (0, 4, 16), (0, 4), (0, 4)]


def test_a_width_that_is_not_that_of_the_heads():
    x, *others = draw(2, 1, 2, 8, 16)
    with pytest.raises(ValueError, match="47 channels; 1 key heads of 8 and 2 value heads of 16 need 48"):
        prepare_prefill(x[:, :-1], *others)


LAYER = """
from vllm.third_party.flash_linear_attention.ops import fused_post_conv_prep

def _resolve_gdn_prefill_backend(vllm_config):
    return vllm_config.requested, vllm_config.active
"""
OPS = """
def fused_post_conv_prep(
    conv_output, a, b, A_log, dt_bias, num_k_heads, head_k_dim, head_v_dim, apply_l2norm=True, output_g_exp=False
):
    return "vLLM's own"
"""
USE = """
import logging
from types import SimpleNamespace as Space

logging.basicConfig(format="%(levelname)s %(name)s %(message)s", level=logging.INFO)

def prepared(d_k, d_v=128):
    import torch
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as layer
    from vllm.third_party.flash_linear_attention.ops import fused_gdn_prefill_post_conv as defined, fused_post_conv_prep
    assert layer.fused_post_conv_prep is fused_post_conv_prep is defined.fused_post_conv_prep
    x, gates, rates = torch.ones(3, 2 * d_k + 2 * d_v), torch.zeros(3, 2), torch.zeros(2)
    result = fused_post_conv_prep(
        conv_output=x, a=gates, b=gates, A_log=rates, dt_bias=rates, num_k_heads=1, head_k_dim=d_k, head_v_dim=d_v,
        apply_l2norm=True, output_g_exp=False,
    )
    return result if isinstance(result, str) else [tuple(r.shape) for r in result]

def chosen(d_k, requested="auto", active="flashinfer"):
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn as layer
    text = Space() if d_k is None else Space(linear_key_head_dim=d_k)
    config = Space(requested=requested, active=active, model_config=Space(hf_text_config=text))
    return layer._resolve_gdn_prefill_backend(config)

from modeling.vllm_plugin import register
"""


def write_vllm(folder: Path, version: str, *, ops: str = OPS, layer: str = LAYER) -> None:
    """A package `vllm` with the modules that the plugin looks at."""
    sources = {
        "": f"__version__ = {version!r}\n",
        "third_party/flash_linear_attention/ops": "from .fused_gdn_prefill_post_conv import fused_post_conv_prep\n",
        "model_executor/layers/mamba/gdn": "",
    }
    for place, source in sources.items():
        package = folder / "vllm" / place
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(source)
    (folder / "vllm/third_party/flash_linear_attention/ops/fused_gdn_prefill_post_conv.py").write_text(ops)
    (folder / "vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py").write_text(layer)


@pytest.fixture(scope="module")
def processes():
    with forks() as found:
        yield found


@pytest.fixture
def run(processes, tmp_path):
    """Returns what code logs, in a process of its own that finds the vllm of `tmp_path`."""
    return lambda code: processes.run(USE + code, tmp_path, ROOT)


SHAPES = "[(3, 1, 64), (3, 1, 64), (3, 2, 128), (3, 2), (3, 2)]"
WORKS = f"assert prepared(64) == {SHAPES}; assert chosen(64) == ('auto', 'triton')\n"
STOCK = """assert prepared(64) == "vLLM's own"; assert chosen(64) == ('auto', 'flashinfer')\n"""


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0+cu129", "0.26.0.post1"])
def test_both_functions_are_replaced_when_vllm_imports_them(run, tmp_path, version):
    write_vllm(tmp_path, version)
    lazily = (
        "import sys; register(); register(); assert not [m for m in sys.modules if m.startswith('vllm.')]\n"
    )
    logged = run(lazily + WORKS + WORKS)
    kernel, backend = logged.splitlines()
    assert kernel == "INFO vllm.plugins.lowkey Lowkey: d_k 64 with d_v 128: Lowkey's kernel prepares prefill"
    assert backend.startswith("INFO") and backend.endswith("this model has 64: the Triton prefill is used")


def test_what_was_imported_before_is_replaced_too(run, tmp_path):
    write_vllm(tmp_path, "0.26.0")
    run(STOCK + "register()\n" + WORKS)


def test_widths_that_vllm_can_do_are_left_to_it(run, tmp_path):
    write_vllm(tmp_path, "0.26.0")
    theirs = """{prepared(128), prepared(96), prepared(65)} == {"vLLM's own"}"""
    logged = run(f"register(); assert {theirs}; assert len(prepared(96, 192)) == 5")
    assert len(logged.splitlines()) == 1 and "d_k 96 with d_v 192" in logged


def test_only_flashinfer_that_nobody_asked_for_is_left_out(run, tmp_path):
    write_vllm(tmp_path, "0.26.0")
    code = """
register()
assert chosen(128) == ("auto", "flashinfer") and chosen(None) == ("auto", "flashinfer")
for requested, active in (("auto", "triton"), ("cutedsl", "cutedsl"), ("triton", "triton")):
    assert chosen(64, requested, active) == (requested, active)
"""
    assert run(code) == ""
    logged = run("register(); assert chosen(96, 'flashinfer') == ('flashinfer', 'flashinfer')")
    assert "WARNING" in logged and "this model has 96: leave --gdn-prefill-backend out, or set it" in logged


@pytest.mark.parametrize("version", ["0.25.0", "0.33.1.dev3+g0123"])
def test_a_version_that_was_not_read_stays_as_it_is(run, tmp_path, version):
    write_vllm(tmp_path, version)
    (line,) = run("register(); register()\n" + STOCK).splitlines()
    assert line.startswith("WARNING") and f"read against vLLM 0.26.0 to 0.33.0, this is {version}" in line
    assert "may not start" in line


def test_a_function_with_other_parameters_stays_as_it_is(run, tmp_path):
    write_vllm(tmp_path, "0.26.0", ops=OPS.replace("output_g_exp=False", "output_g_exp=False, layout=None"))
    logged = run("register(); assert prepared(64) == \"vLLM's own\"; assert chosen(64)[1] == 'triton'")
    assert "fused_gdn_prefill_post_conv.fused_post_conv_prep is not what it was in 0.26.0 to 0.33.0" in logged
    write_vllm(tmp_path, "0.26.0", layer=LAYER.replace("_resolve_gdn", "resolve_gdn"))
    logged = run('register()\nassert prepared(64) != "vLLM\'s own"')
    assert "_resolve_gdn_prefill_backend is not what it was" in logged


def test_nothing_happens_without_vllm(run):
    code = "register(); assert sys.meta_path == before and 'vllm' not in sys.modules"
    assert run("import sys; before = [*sys.meta_path]; " + code) == ""


def test_vllm_finds_it_by_its_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert name == "lowkey" and EntryPoint(name, value, "vllm.general_plugins").load() is vllm_plugin.register


def test_the_file_stands_alone(processes, tmp_path):
    """It is meant to be read, and may be copied, without the rest."""
    write_vllm(tmp_path, "0.26.0")
    (tmp_path / "copied.py").write_text(Path(vllm_plugin.__file__).read_text())
    processes.run("import copied, sys; copied.register(); assert 'modeling' not in sys.modules", tmp_path)
