"""What is known of the request that is being served, for the log and the limits."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.api.http.auth import Client

if TYPE_CHECKING:
    from server.api.completions.generation import Generation


@dataclass
class RequestContext:
    """Filled in while the request runs; logged as one line at its end."""

    request_id: str
    client: Client | None = None
    """None until it is known."""
    variants: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    finish_reason: str | None = None
    texts: list[dict[str, str]] = field(default_factory=list)
    """Prompts and completions; empty unless the settings ask for them."""

    def add(self, generation: "Generation", *, with_text: bool) -> None:
        """Account for a generation that has ended, well or not. One that never ran costs nothing."""
        name = generation.variant.name
        # A prompt counts once, however many choices it has.
        prompt = 0 if generation.choice else len(generation.prompt_ids)
        completion = len(generation.token_ids)
        if name not in self.variants:
            self.variants.append(name)
        self.finish_reason = generation.finish_reason
        if completion or generation.finish_reason == "length":  # of no tokens: the prompt alone was asked for
            self.charge(prompt, completion)
        if self.ttft_s is None:
            self.ttft_s = generation.ttft_s
        if with_text:
            text = generation.variant.tokenizer.decode(generation.prompt_ids, skip_special_tokens=False)
            self.texts.append({"variant": name, "prompt": text, "completion": generation.text})

    def charge(self, prompt: int, completion: int = 0) -> None:
        """Tokens that were run count for the log and for the key's limit."""
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if self.client is not None:
            self.client.take_tokens(prompt + completion)

    def fields(self) -> dict[str, Any]:
        """For the log; what there is nothing to say of is left out."""
        given: dict[str, Any] = {
            "key": "" if self.client is None else self.client.name,
            "variant": ",".join(self.variants),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
            "finish_reason": self.finish_reason,
            "texts": self.texts,
        }
        return {name: value for name, value in given.items() if value}


current: ContextVar[RequestContext | None] = ContextVar("lowkey_request", default=None)
"""The context of the request that this task works for."""
