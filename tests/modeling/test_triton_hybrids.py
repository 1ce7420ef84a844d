"""Whole hybrid models by our Triton kernels, run by Triton's interpreter, against the plain torch model in float64,
which `test_hybrids.py` holds against stock transformers."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from hybrid_cases import CASES, FULL, LINEAR
from hybrids import write_hybrid
from recorders import CallingRecorder

from modeling.checkpoint import open_checkpoint
from modeling.model import Model
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime import UnavailableError
from modeling.runtime.gpu import attention
from modeling.runtime.gpu.graphs import DecodeGraphs
from modeling.runtime.gpu.runtime import GpuRuntime
from modeling.spec import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec
from modeling.state import StatePool

NAMES = ("text-dense-odd-irregular", "olmo-odd-irregular")
FEW_LAYERS = (LINEAR, FULL)
MODELS = {name: CASES[name] for name in NAMES} | {
    f"{name}-2-layers": replace(CASES[name], layer_types=FEW_LAYERS) for name in NAMES
}
PIECES = ((3, 40), (62, 5))
"""Tokens of two prompts that go in together, one round after the other: the second begins before a page's end, and
goes on over it."""
STEPS = 2


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter runs one program after the other."""
    monkeypatch.setattr(attention, "PROGRAMS", 12)
    monkeypatch.setattr(attention, "PACKED_TILES", {4: (64, 2, 4096)})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in NAMES else name for name in MODELS]
)
@torch.inference_mode()
def test_prompts_in_pieces_and_recorded_steps(tmp_path, name):
    model = open_checkpoint(write_hybrid(tmp_path / "c", MODELS[name])).load()
    totals = [sum(piece) + STEPS for piece in zip(*PIECES, strict=True)]
    torch.manual_seed(0)
    texts = [torch.randint(1, 257, (total,)) for total in totals]
    pool = StatePool(model.spec, 4, pages=5, max_tokens=128)
    slots = [3, 1]
    runtime = GpuRuntime(model, chunked_gated_delta_rule)
    recorder = CallingRecorder()
    graphs = DecodeGraphs(runtime, pool, [3], recorder)
    found = [[] for _ in texts]
    for piece in PIECES:
        begin = [sum(map(len, part)) for part in found]
        ids = [text[at : at + n] for text, at, n in zip(texts, begin, piece, strict=True)]
        for slot, at, n in zip(slots, begin, piece, strict=True):
            assert pool.grow(slot, at + n)
        hidden = runtime.prefill(torch.cat(ids), [0, piece[0], sum(piece)], pool, torch.tensor(slots))
        for part, h in zip(found, hidden.split(piece), strict=True):
            part.append(h)
    for step in range(-STEPS, 0):
        for slot, total in zip(slots, totals, strict=True):
            assert pool.grow(slot, total + 1 + step)
        hidden = graphs(torch.stack([text[step] for text in texts]), torch.tensor(slots)).clone()
        for part, h in zip(found, hidden, strict=True):
            part.append(h[None])
    assert recorder.replayed == [3] * STEPS, "two requests, and one row on the null slot"
    assert pool.pages.lengths.tolist() == [0, totals[1], 0, totals[0], 0]
    expected, _ = model.double()(torch.cat(texts), [0, totals[0], sum(totals)])
    for part, exact in zip(found, expected.split(totals), strict=True):
        ours = torch.cat(part).double()
        assert float((ours - exact).norm() / exact.norm()) < 1e-5


def test_heads_too_wide_for_a_multiprocessor_are_refused():
    norm = NormSpec(1e-6)
    layer = LayerSpec(AttentionSpec(1, 1, 257, None, "none", False, 1e-6), MLPSpec(8), norm)
    model = Model(ModelSpec("test", 16, 8, (layer,), norm, True, 64, ()))
    with pytest.raises(
        UnavailableError, match="layer 0 has attention heads of 257 channels; on a GPU they may have 256"
    ):
        GpuRuntime(model, chunked_gated_delta_rule)


@pytest.mark.parametrize("name", ["text-dense-odd-irregular", "gated_deltanet"])
@pytest.mark.parametrize(("card", "bytes_there"), [("NVIDIA A100", 167_936), ("NVIDIA H100", 233_472)])
def test_a_gpu_with_little_shared_memory_runs_no_hybrids(tmp_path, monkeypatch, name, card, bytes_there):
    """Their kernels could not be launched. It runs models of linear attention alone."""
    is_hybrid = name in CASES
    write, case = (write_hybrid, CASES[name]) if is_hybrid else (write_checkpoint, GATED)
    model = open_checkpoint(write(tmp_path / "c", case)).load()
    properties = SimpleNamespace(name=card, shared_memory_per_multiprocessor=bytes_there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(Model, "device", torch.device("cuda", 0))
    refused = is_hybrid and "A100" in card
    error = pytest.raises(UnavailableError, match="196,608 .* NVIDIA A100 has 167,936")
    with error if refused else nullcontext():
        GpuRuntime(model, chunked_gated_delta_rule)
