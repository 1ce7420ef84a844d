"""Gradient statistics against what they mean: finite differences of the loss, and autograd on the plain weights."""

import pytest
import torch
import torch.nn.functional as F
from checkpoints import DELTA, GATED, random_tensors, write_checkpoint

from modeling.checkpoint import open_checkpoint
from pruning.collection import zeros
from pruning.errors import PruningError
from pruning.gradients import GRADIENTS, add_gradients

WINDOWS = torch.randint(1, 257, (3, 20), generator=torch.Generator().manual_seed(0))


def collect_gradients(model, windows, names):
    sums = zeros(model.spec, names)
    assert list(add_gradients(model, windows, sums)) == [windows.shape[1]] * len(windows)
    return sums


@pytest.fixture(params=[GATED, DELTA], ids=["gated", "delta"], scope="module")
def model(request, tmp_path_factory):
    checkpoint = open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("g") / "c", request.param))
    return checkpoint.load(dtype=torch.float64)


@pytest.fixture(scope="module")
def sums(model):
    return collect_gradients(model, WINDOWS, GRADIENTS)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def loss(model, window, tap=None):
    hidden, _ = model(window, [0, len(window)], tap=tap)
    return F.cross_entropy(model.logits(hidden[:-1]), window[1:], reduction="sum")


def gate_on(name, layer, head, channel, z):
    """A tap that multiplies one channel of q or of k by z."""

    def tap(i, x, q, k):
        gate = torch.ones_like(q)
        if i == layer:
            gate[:, head, channel] = z
        return (q * gate, k) if name == "q" else (q, k * gate)

    return tap


@torch.no_grad()
def test_gate_fisher_is_the_squared_slope_of_each_window_s_loss(model, sums):
    step = 1e-5
    for layer, head, channel in ((0, 0, 3), (1, 1, 0), (2, 1, 31 if model.spec.d_k[2] == 32 else 15)):
        expected = 0.0
        for window in WINDOWS:
            slope = 0.0
            for gated in "qk":  # a gate on q and one on k, each by itself: their slopes add up
                values = []
                for z in (1 + step, 1 - step):
                    values.append(float(loss(model, window, gate_on(gated, layer, head, channel, z))))
                slope += (values[0] - values[1]) / (2 * step)
            expected += slope**2
        assert float(sums[layer]["gate_fisher"][head, channel]) == pytest.approx(expected, rel=1e-5)


def test_weight_gradients_are_those_of_the_summed_loss(model, sums):
    for p in model.parameters():
        p.requires_grad_(True)
    total = sum(loss(model, window) for window in WINDOWS)
    weights = [block.mixer.in_proj.weight for block in model.layers]
    expected = torch.autograd.grad(total, weights)
    model.requires_grad_(False)
    for found, gradient, layer in zip(sums.values(), expected, model.spec.layers, strict=True):
        m = layer.mixer
        q, k = gradient[: m.key_dim], gradient[m.key_dim : 2 * m.key_dim]
        for name, rows in (("q_gradient", q), ("k_gradient", k)):
            assert found[name].dtype == torch.float64
            assert found[name].shape == (m.num_k_heads, m.d_k, model.spec.hidden_size)
            assert relative(found[name].flatten(0, 1), rows) < 1e-12


def test_a_channel_that_is_always_zero_has_no_gate_to_feel(tmp_path):
    tensors = random_tensors(GATED)
    for name in "qk":
        tensors[f"model.layers.1.attn.{name}_conv1d.weight"][37] = 0  # head 1, channel 5
    model = open_checkpoint(write_checkpoint(tmp_path / "c", GATED, tensors)).load()
    fisher = collect_gradients(model, WINDOWS, ["gate_fisher"])[1]["gate_fisher"]
    assert float(fisher[1, 5]) == 0
    assert int((fisher == 0).sum()) == 1


def test_windows_add_up_in_any_order_and_any_split(model, sums):
    backwards = collect_gradients(model, WINDOWS.flip(0), GRADIENTS)
    parts = [collect_gradients(model, rows, GRADIENTS) for rows in WINDOWS.split([1, 2])]
    for i, layer in sums.items():
        for name, value in layer.items():
            assert relative(backwards[i][name], value) < 1e-12
            assert relative(parts[0][i][name] + parts[1][i][name], value) < 1e-12


def test_only_what_is_asked_for_is_kept_and_the_model_is_left_as_it_was(model):
    weight = model.layers[0].mixer.in_proj.weight
    layers = collect_gradients(model, WINDOWS, ["gate_fisher"])
    assert [set(layer) for layer in layers.values()] == [{"gate_fisher"}] * 3
    assert not weight.requires_grad and weight.grad is None
    with torch.no_grad():  # the caller's grad mode does not matter
        again = collect_gradients(model, WINDOWS, ["gate_fisher"])
    assert torch.equal(again[0]["gate_fisher"], layers[0]["gate_fisher"])


def test_windows_of_one_token_are_refused(model):
    with pytest.raises(PruningError, match="window_length=1 leaves no token to predict"):
        collect_gradients(model, WINDOWS[:, :1], GRADIENTS)


def test_gradients_that_are_not_finite_are_named(tmp_path):
    tensors = random_tensors(GATED)
    tensors["lm_head.weight"][3, 3] = float("inf")
    model = open_checkpoint(write_checkpoint(tmp_path / "c", GATED, tensors)).load()
    with pytest.raises(PruningError, match="layer 0: q_gradient holds NaN or Inf"):
        collect_gradients(model, WINDOWS, GRADIENTS)


def test_a_layer_whose_tap_never_fires_fails(tmp_path):
    model = open_checkpoint(write_checkpoint(tmp_path / "c", GATED)).load()
    mixer = model.layers[2].mixer
    forward = mixer.forward
    mixer.forward = lambda x, cu, state, *, rule, tap: forward(x, cu, state, rule=rule)
    with pytest.raises(PruningError, match="layer 2: the tap saw 0 of 20 tokens"):
        collect_gradients(model, WINDOWS, GRADIENTS)
