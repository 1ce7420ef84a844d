"""What is known of the request that is being served, for the log and the limits."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from server.api.http.auth import Client


@dataclass
class RequestContext:
    """What one request has come to so far. It is filled in while the request runs, and logged as one line at its
    end."""

    request_id: str
    log_texts: bool = False
    """Whether prompts and completions are logged too."""
    client: Client | None = None
    """Who sent the request; None until that is known."""
    variants: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    finish_reason: str | None = None
    texts: list[dict[str, str]] = field(default_factory=list)
    """Prompts and completions; empty unless `log_texts`."""

    def add(
        self,
        variant: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        finish_reason: str,
        ttft_s: float | None,
    ) -> None:
        """Account for a generation that has ended, well or not. One that never ran costs nothing."""
        if variant not in self.variants:
            self.variants.append(variant)
        self.finish_reason = finish_reason
        if completion_tokens or finish_reason == "length":  # of no tokens: the prompt alone was asked for
            self.charge(prompt_tokens, completion_tokens)
        if self.ttft_s is None:
            self.ttft_s = ttft_s

    def charge(self, prompt: int, completion: int = 0) -> None:
        """Count tokens that were run, for the log and for the key's limit."""
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if self.client is not None:
            self.client.take_tokens(prompt + completion)

    def fields(self) -> dict[str, Any]:
        """What the log says of the request; what is unknown or zero is left out."""
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
