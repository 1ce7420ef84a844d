"""An engine on a model with layers of another kind: the same tokens as a plain loop, whatever it does with states."""

import pytest
import torch
from engines import Bench, generate, prompt, run, sampling, tokens_of
from second_kind import AverageSpec, registered
from specs import mixer_spec

from modeling.model import Model
from modeling.spec import LayerSpec, MLPSpec, ModelSpec, NormSpec
from modeling.state import StatePool
from server.engine.state_file import layout
from server.wire.messages import SaveState


class MixedBench(Bench):
    """Linear layers and moving averages in turns."""

    def __init__(self):
        delta = mixer_spec(num_k_heads=2, num_v_heads=4, d_k=10, d_v=24)
        layers = tuple(
            LayerSpec(mixer, MLPSpec(40), NormSpec(1e-6)) for mixer in (delta, AverageSpec(12)) * 2
        )
        torch.manual_seed(0)
        self.model = Model(ModelSpec("mixed", 257, 24, layers, NormSpec(1e-6), False, 64, ()))
        self.model.requires_grad_(False)
        for name, p in self.model.named_parameters():
            torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
            if "norm" in name:
                p += 1


@pytest.fixture(scope="module")
def bench():
    with registered():
        yield MixedBench()


@pytest.mark.parametrize(
    "options", [{}, {"depth": 1}, {"prefix_cache": True}, {"batch_invariant": True}], ids=str
)
def test_tokens_are_those_of_a_plain_loop(bench, options):
    engine = bench.engine(slots=4, prefill_tokens=64, **options)
    shared = prompt(130)
    messages = [generate(prompt(n, seed=n), 9) for n in (1, 63, 64, 65, 200)]
    messages += [generate([*shared, i], 7, sampling=sampling(3, choice=i)) for i in range(3)]
    messages += [generate(shared, 6, sampling=sampling(5, choice=i)) for i in range(2)]
    tokens = tokens_of(run(engine, {i: [message] for i, message in enumerate(messages)}))
    for message in messages:
        assert bench.check_tokens(message, tokens[message.request_id]) == message.max_tokens
    assert engine.occupancy.used_slots == 0


def test_a_saved_state_holds_what_every_layer_keeps(bench, tmp_path):
    before, after, path = prompt(150), prompt(70, seed=1), str(tmp_path / "state")
    engine = bench.engine()
    saved = SaveState(request_id="s", token_ids=before, path=path, fingerprint={})
    (answer,) = (s for o in run(engine, {0: [saved]}) for s in o.saved)
    assert answer.error is None
    message = generate(after, 8, state_path=path)
    tokens = tokens_of(run(bench.engine(), {0: [message]}))
    assert bench.check_tokens(generate([*before, *after], 8), tokens[message.request_id]) == 8


def test_the_layout_of_a_file_names_the_tensors_of_every_kind(bench):
    names = layout(StatePool(bench.model.spec, 1))
    assert names["layers.1.average"] == ("F32", [12]) and names["layers.2.conv"] == ("F32", [136, 3])
    assert len(names) == 6
