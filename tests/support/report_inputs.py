"""Small tables as `sweep` and the MQAR benchmark write them, with figures that are easy to tell apart."""

EVIL = "<img src=http://x.example/>&</script>"


def table(**changes):
    cells = [
        {
            "row": row,
            "column": column,
            "method": row.split(",")[0],
            "seed": seed,
            "d_k": [column, column] if "," not in row else [column - 4, column + 4],
            "state_bytes": 100 * column,
            "perplexity": 10.0 + rise + seed,
            "kl": (rise + seed) / 100,
            "top1_agreement": 0.9,
        }
        for row, rise in (("l1", 2.0), (EVIL, 1.0), ("l1, per layer", 0.5))
        for column in (16, 8)
        for seed in (0, 1)
    ]
    curves = [{"8": 0.2, "16": 0.1, "32": 0.0}, {"8": 0.4, "16": 0.3, "32": 0.0}]
    return {
        "kind": "pruning_table",
        "format": 1,
        "checkpoint": EVIL,
        "sha256": "ab" * 32,
        "device": "cpu",
        "kl_tokens": 512,
        "dense": {"d_k": [32, 32], "state_bytes": 3200, "perplexity": 10.0, "tokens": 1024},
        "reduced": cells,
        "curves": [
            {
                "method": "l1",
                "seed": seed,
                "loss_rise": [{n: (1 + seed) * r for n, r in c.items()} for c in curves],
            }
            for seed in (0, 1)
        ],
        **changes,
    }


def mqar_record(**changes):
    """A table of MQAR: a dense model and `l1` at two seeds, right in shares that are easy to tell apart."""

    def recalled(method, seed, d_k, state_dtype, *shares, trained=False):
        accuracy = [
            {
                "pairs": pairs,
                "queries": 400,
                "accuracy": share,
                "standard_error": (share * (1 - share) / 400) ** 0.5,
            }
            for pairs, share in zip((4, 8), shares, strict=True)
        ]
        return {
            "method": method,
            "seed": seed,
            "d_k": d_k,
            "trained": trained,
            "state_dtype": state_dtype,
            "state_bytes": 100 * d_k,
            "accuracy": accuracy,
        }

    return {
        "kind": "mqar",
        "format": 1,
        "checkpoint": EVIL,
        "sha256": "cd" * 32,
        "versions": {"torch": "2"},
        "environment": {"device": "cpu", "threads": 1},
        "settings": {"queries": 400},
        "training": [],
        "recalled": [
            recalled(None, 0, 16, "float32", 1.0, 0.9),
            recalled(None, 0, 16, "int8", 1.0, 0.8),
            *(recalled("l1", seed, 8, "float32", 0.75 + seed / 10, 0.5) for seed in (0, 1)),
            *(recalled("l1", seed, 8, "int8", 0.7, 0.4) for seed in (0, 1)),
            recalled(None, 0, 16, "float32", 1.0, 1.0, trained=True),
            recalled("l1", 0, 8, "float32", 1.0, 0.5, trained=True),
        ],
        **changes,
    }
