"""What shapes say about serving, for the public models: figures that were computed apart from this code, of which block
sizes agree with what users of vLLM report."""

import pytest
from checkpoints import GATED

from modeling.families import family_of
from pruning.capacity import (
    GPU_BYTES,
    block_size,
    capacity_lines,
    capacity_table,
    gain,
    narrower,
    parameter_count,
    requests_that_fit,
    served,
    weights_bytes,
)

LINEAR = {
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 262144,
}


def qwen(hidden, intermediate, layers, heads, kv_heads, v_heads, *, tied=False):
    text = {
        **LINEAR,
        "vocab_size": 248320,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": v_heads,
    }
    return {"model_type": "qwen3_5", "tie_word_embeddings": tied, "text_config": text}


def experts(hidden, count, top, size, layers, heads, v_heads):
    config = qwen(hidden, 1, layers, heads, 2, v_heads)
    of_experts = {
        "num_experts": count,
        "num_experts_per_tok": top,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": size,
    }
    return {**config, "model_type": "qwen3_5_moe", "text_config": {**config["text_config"], **of_experts}}


NEXT = {
    **experts(2048, 512, 10, 512, 48, 16, 32)["text_config"],
    "model_type": "qwen3_next",
    "vocab_size": 151936,
}
OLMO = {
    **LINEAR,
    "model_type": "olmo_hybrid",
    "vocab_size": 100352,
    "hidden_size": 3840,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 30,
    "num_key_value_heads": 30,
    "head_dim": 128,
    "linear_num_key_heads": 30,
    "linear_num_value_heads": 30,
    "linear_key_head_dim": 96,
    "linear_value_head_dim": 192,
    "linear_allow_neg_eigval": True,
    "rope_parameters": {"rope_theta": None},
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
}
MODELS = {
    "0.8B": qwen(1024, 3584, 24, 8, 2, 16, tied=True),
    "2B": qwen(2048, 6144, 24, 8, 2, 16, tied=True),
    "4B": qwen(2560, 9216, 32, 16, 4, 32, tied=True),
    "9B": qwen(4096, 12288, 32, 16, 4, 32),
    "27B": qwen(5120, 17408, 64, 24, 4, 48),
    "35B": experts(2048, 256, 8, 512, 40, 16, 32),
    "122B": experts(3072, 256, 8, 1024, 48, 32, 64),
    "397B": experts(4096, 512, 10, 1024, 60, 32, 64),
    "next": NEXT,
    "olmo": OLMO,
}


def spec_of(name):
    return family_of(MODELS[name]).spec(MODELS[name])


def with_share(spec, share):
    return spec.with_d_k(tuple(int(d_k * share) for d_k in spec.d_k))


SIZES = {
    # Billions of parameters, GiB in bfloat16, MB of state in float32 at d_k 128, 96, 64 and 32, bytes of KV a token.
    "0.8B": (0.75, 1.4, (19.54, 14.71, 9.88, 5.05), 12_288),
    "2B": (1.88, 3.5, (19.54, 14.71, 9.88, 5.05), 12_288),
    "4B": (4.21, 7.8, (51.51, 38.78, 26.05, 13.32), 32_768),
    "9B": (8.95, 16.7, (51.51, 38.78, 26.05, 13.32), 32_768),
    "27B": (26.90, 50.1, (153.94, 115.90, 77.86, 39.81), 65_536),
    "35B": (34.66, 64.6, (64.39, 48.48, 32.56, 16.65), 20_480),
    "122B": (122.1, 227.5, (153.65, 115.68, 77.71, 39.74), 24_576),
    "397B": (396.4, 738, (192.06, 144.60, 97.14, 49.67), 30_720),
    "next": (79.67, 148.4, (77.27, 58.17, 39.08, 19.98), 24_576),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_public_models(name):
    billions, gib, states, kv = SIZES[name]
    spec = spec_of(name)
    assert parameter_count(spec) / 1e9 == pytest.approx(billions, rel=2e-3 if billions > 100 else 5e-3)
    assert weights_bytes(spec) / 2**30 == pytest.approx(gib, rel=1e-3 if gib > 100 else 3e-2)
    assert spec.kv_bytes_per_token(served()) == kv
    models = [spec, *narrower(spec)]
    assert [model.d_k[0] for model in models] == [128, 96, 64, 32]
    found = [round(model.state_bytes(0, served()) / 1e6, 2) for model in models]
    assert found == pytest.approx(states, abs=0.011)


def test_olmo_hybrid():
    spec = spec_of("olmo")
    assert parameter_count(spec) / 1e9 == pytest.approx(7.43, abs=5e-3)
    half = with_share(spec, 1 / 2)
    assert [round(s.state_bytes(0, served()) / 1e6, 2) for s in (spec, half)] == [54.74, 27.79]
    assert spec.kv_bytes_per_token(served()) == 122_880
    assert [s.d_k[0] for s in narrower(spec)] == [72, 48, 24]


@pytest.mark.parametrize(
    ("names", "float32", "bfloat16"),
    [
        (("0.8B", "2B"), (544, 272), None),
        (("4B", "9B"), (528, 272), None),
        (("27B",), (784, 400), (400, 208)),
        (("35B", "next"), (1056, 544), None),
        (("122B", "397B"), (2096, 1056), None),
    ],
)
def test_blocks_of_vllm(names, float32, bfloat16):
    for name in names:
        spec = spec_of(name)
        models = (spec, with_share(spec, 1 / 2))
        assert tuple(map(block_size, models)) == float32
        if bfloat16:
            assert tuple(block_size(model, "bfloat16") for model in models) == bfloat16


GAINS = {
    ("0.8B", "4B", "9B"): {0: 1.98, 512: 1.59, 1024: 1.43, 2048: 1.27, 4096: 1.16, 16384: 1.05},
    ("27B",): {0: 1.98, 512: 1.68, 1024: 1.52, 2048: 1.36, 4096: 1.22, 16384: 1.07},
    ("35B",): {0: 1.98, 512: 1.74, 1024: 1.59, 2048: 1.43, 4096: 1.27, 16384: 1.09},
}


@pytest.mark.parametrize("names", GAINS)
def test_gains_with_the_kv_cache_counted(names):
    for name in names:
        spec = spec_of(name)
        for tokens, expected in GAINS[names].items():
            assert gain(spec, with_share(spec, 1 / 2), tokens) == pytest.approx(expected, abs=0.0101)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("27B", {0: (140, 277), 4096: (51, 62)}), ("35B", {0: (93, 184), 4096: (40, 51)})],
)
def test_requests_that_fit_on_a_card(name, counts):
    spec = spec_of(name)
    left = GPU_BYTES - weights_bytes(spec)
    for tokens, expected in counts.items():
        found = tuple(requests_that_fit(s, tokens, left) for s in (spec, with_share(spec, 1 / 2)))
        assert found == pytest.approx(expected, abs=1), "they were computed from weights of 64.6 GiB, rounded"


def test_the_table_of_a_model_that_fits():
    spec = spec_of("27B")
    header, rows = capacity_table([(str(s.d_k[0]), s) for s in (spec, *narrower(spec))])
    assert header == ["", "d_k 128", "d_k 96", "d_k 64", "d_k 32"]
    table = {label: cells for label, *cells in rows}
    assert table["state in float32"] == ["153.9 MB", "115.9 MB", "77.9 MB", "39.8 MB"]
    assert table["vLLM's block"] == ["784 tokens", "592 tokens", "400 tokens", "208 tokens"]
    assert table["requests at 0"] == ["140", "186 (1.33x)", "277 (1.98x)", "542 (3.87x)"]
    assert table["requests at 4k"][::2] == ["51", "62 (1.22x)"]
    assert list(table)[-4:] == [f"requests at {n}" for n in ("0", "1k", "4k", "16k")]
    lines = list(capacity_lines(spec))
    assert "65,536 bytes a token" in lines[0] and "2,349 tokens" in lines[0]
    assert "26.90 billion parameters, 50.1 GiB" in lines[1] and "leave 20.1 GiB" in lines[1]
    assert "(without mtp.* and model.visual.*, where there are any)" in lines[1]


def test_no_requests_have_no_multiple(monkeypatch):
    spec = spec_of("27B")
    half = with_share(spec, 1 / 2)
    monkeypatch.setattr("pruning.capacity.GPU_BYTES", weights_bytes(spec) + half.state_bytes(0, served()))
    _, rows = capacity_table([("128", spec), ("64", half)])
    assert [row[1:] for row in rows[-4:]] == [["0", "1 (1.98x)"], *[["0", "0"]] * 3]


def test_what_no_server_runs_has_states_and_no_requests():
    spec = spec_of("27B")
    _, rows = capacity_table([("128", spec), ("64", with_share(spec, 1 / 2))], on_card=False)
    assert [row[0] for row in rows] == [f"state in {dtype}" for dtype in ("float32", "bfloat16", "int8")]


def test_the_table_of_a_model_whose_weights_do_not_fit():
    spec = spec_of("122B")
    _, rows = capacity_table([("128", spec), ("64", with_share(spec, 1 / 2))])
    assert [row[1:] for row in rows[4:]] == [
        ["1.00x", "1.98x"],
        ["1.00x", "1.74x"],
        ["1.00x", "1.43x"],
        ["1.00x", "1.16x"],
    ]
    assert "more than the 70.2 GiB" in list(capacity_lines(spec))[1]


def test_a_model_without_softmax_attention_has_no_blocks_and_one_gain():
    spec = family_of(GATED).spec(GATED)
    half = with_share(spec, 1 / 2)
    assert block_size(spec) is None
    _, rows = capacity_table([("32", spec), ("16", half)])
    labels = [f"state in {dtype}" for dtype in ("float32", "bfloat16", "int8")]
    assert [row[0] for row in rows] == [*labels, "requests"]
    assert gain(spec, half, 0) == gain(spec, half, 16384)
    assert len(list(capacity_lines(spec))) == 1


def test_a_d_k_that_is_narrow_already_is_not_reduced_to_nothing():
    spec = family_of(GATED).spec({**GATED, "head_dim": 2, "expand_v": 8.0})
    assert [s.d_k[0] for s in narrower(spec)] == [1]
