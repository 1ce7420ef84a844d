"""What an engine says once it has loaded its model."""

from typing import Any

from server.wire.messages import Ready


def ready(**fields: Any) -> Ready:
    """That of a small model; `fields` say what is otherwise."""
    defaults: dict[str, Any] = dict(
        family="deltanet",
        d_k=[4],
        d_v=[4],
        vocab_size=8,
        context_length=100,
        eos_token_ids=[],
        checkpoint_path="x",
        method=None,
        state_bytes_per_request=64,
        state_dtype="float32",
        device="cpu",
        backend="none",
        weights_bytes=1,
        load_s=0.0,
        slots=8,
        max_running=8,
    )
    return Ready(**{**defaults, **fields})
