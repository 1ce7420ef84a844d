"""One comparison under way: each variant completes the prompt, then each scores the baseline's completion."""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from server.api.ab.scoring import Scores, pair_of, score
from server.api.completions.generation import Generation
from server.api.completions.schemas import CompareRequest
from server.api.http.aside import aside
from server.api.http.streaming import merged
from server.api.serving.prompts import encode_prompt
from server.api.serving.service import ServerState
from server.api.serving.variants import Variant
from server.text.detokenizer import Detokenizer

Event = dict[str, Any]


class Comparison:
    """Make it with `create`, then take its `events` or `run` it, once.

    Args:
        variants: the baseline first.
        prompt_ids: by variant name.
        arrived: time.monotonic() of the HTTP request.
        priority: of its completions in the engines; lower runs first.
        salt: what its prefixes are kept under (`cache_salt`).
    """

    def __init__(
        self,
        state: ServerState,
        body: CompareRequest,
        variants: list[Variant],
        prompt_ids: dict[str, list[int]],
        arrived: float,
        priority: int,
        salt: bytes,
    ) -> None:
        self._state = state
        # With one seed for all, sampled answers differ only where the distributions do. The answer says which it was:
        # 53 bits are as many as JavaScript can read.
        self._body = body.model_copy(
            update={"seed": secrets.randbits(53) if body.seed is None else body.seed}
        )
        self._variants = variants
        self._prompt_ids = prompt_ids
        self._arrived = arrived
        self._priority = priority
        self._salt = salt
        self._parallel = bool(body.parallel)
        self._generations: dict[str, Generation] = {}
        self._head = {"id": f"cmp-{secrets.token_hex(12)}", "created": int(time.time())}

    @classmethod
    async def create(
        cls,
        state: ServerState,
        body: CompareRequest,
        variants: list[Variant],
        *,
        arrived: float,
        priority: int,
        salt: bytes,
    ) -> "Comparison":
        """Tokenises. Raises APIError 400 if the prompt is no good."""
        prompt_ids = {
            variant.name: await encode_prompt(
                state,
                variant,
                body.prompt,
                body.token_limit,
                special=body.add_special_tokens is not False,
                last=body.truncate_prompt_tokens,
            )
            for variant in variants
        }
        # Prompts that were cut to fit differ where contexts do: all are cut to the shortest.
        least = min(map(len, prompt_ids.values()))
        prompt_ids = {name: ids[-least:] for name, ids in prompt_ids.items()}
        return cls(state, body, variants, prompt_ids, arrived, priority, salt)

    async def run(self) -> Event:
        """The whole answer. Raises as `events` does."""
        async with contextlib.aclosing(self.events()) as events:
            async for event in events:
                last = event
        return last

    async def events(self) -> AsyncGenerator[Event]:
        """Each piece of text and each end of a completion as they come, then the whole answer.

        Raises:
            APIError: 503, there is no room for the log-probabilities.
            EngineError: an engine went away, or its output is broken.
        """
        if self._parallel:
            together = merged([self._generate(v, self._arrived) for v in self._variants])
            async with contextlib.aclosing(together) as tagged:
                async for _, event in tagged:
                    yield event
        else:
            self._state.timed_comparisons += 1
            # Whoever goes first finds cold caches.
            order = self._variants[:: -1 if self._state.timed_comparisons % 2 == 0 else 1]
            for variant in order:
                begins = self._arrived if variant is order[0] else time.monotonic()
                async with contextlib.aclosing(self._generate(variant, begins)) as events:
                    async for event in events:
                        yield event
        base = self._generations[self._variants[0].name]
        async with self._state.scoring:
            scores = await score(
                self._state.variants.runtime_dir,
                self._variants,
                base.prompt_ids,
                base.token_ids,
                priority=min(self._priority, 0),  # other comparisons wait for this one to be over
                salt=self._salt,
            )
        yield self._answer(base, scores, await aside(self._token_texts))

    async def _generate(self, variant: Variant, begins: float) -> AsyncGenerator[Event]:
        ids = self._prompt_ids[variant.name]
        generation = Generation(
            self._state,
            variant,
            self._body,
            ids,
            endpoint="compare",
            arrived=begins,
            priority=self._priority,
            most_unread=self._state.settings.stream_buffer_bytes / len(self._variants),
            salt=self._salt,
        )
        self._generations[variant.name] = generation
        async with contextlib.aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                yield self._event("compare.chunk", generation, text=chunk.text)
        yield self._event("compare.end", generation, finish_reason=generation.finish_reason)

    def _event(self, kind: str, generation: Generation, **fields: Any) -> Event:
        return {
            **self._head,
            "object": kind,
            "variant": generation.variant.name,
            **fields,
            "usage": generation.usage,
            "lowkey": generation.lowkey,
        }

    def _token_texts(self) -> dict[str, list[str]]:
        skip = self._body.skip_special_tokens is not False
        return {name: _token_texts(generation, skip) for name, generation in self._generations.items()}

    def _answer(self, base: Generation, scores: dict[str, Scores], texts: dict[str, list[str]]) -> Event:
        results = []
        for variant in self._variants:
            generation, own = self._generations[variant.name], scores[variant.name]
            difference = None
            if generation is not base:
                difference = self._difference(base, generation, own)
                self._observe(base, generation, scores)
            results.append(
                {
                    "variant": variant.name,
                    "text": generation.text,
                    "tokens": texts[variant.name],
                    "finish_reason": generation.finish_reason,
                    "usage": generation.usage,
                    "lowkey": generation.lowkey,
                    "prompt_perplexity": own.prompt_perplexity,
                    "against_baseline": difference,
                }
            )
        return {
            **self._head,
            "object": "compare",
            "baseline": base.variant.name,
            "parallel": self._parallel,
            "seed": self._body.seed,
            "results": results,
        }

    def _difference(self, base: Generation, other: Generation, scores: Scores) -> dict[str, Any]:
        """What changed from the baseline to another variant."""
        return {
            "mean_kl": scores.mean_kl,
            "kl": scores.kl,
            "top1_agreement": scores.top1_agreement,
            "agree": scores.agree,
            "first_divergence": _first_divergence(base.token_ids, other.token_ids),
            "state_bytes_ratio": (
                other.variant.info.state_bytes_per_request / base.variant.info.state_bytes_per_request
            ),
            "tokens_per_second_ratio": (
                None if self._parallel else _ratio(other.tokens_per_second, base.tokens_per_second)
            ),
        }

    def _observe(self, base: Generation, other: Generation, scores: dict[str, Scores]) -> None:
        names = base.variant.name, other.variant.name
        timings: dict[str, float | None] = {}
        if not self._parallel and base.ttft_s is not None and other.ttft_s is not None:
            timings = {
                "speed_ratio": _ratio(other.tokens_per_second, base.tokens_per_second),
                "ttft_difference_s": other.ttft_s - base.ttft_s,
            }
        pair = pair_of(scores[names[0]], scores[names[1]], **timings)
        self._state.observe_pair(names[1], names[0], "compare", pair)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _first_divergence(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that only one of them has there; None if there is none."""
    pairs = zip(a, b, strict=False)
    different = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    return min(len(a), len(b)) if different is None and len(a) != len(b) else different


def _token_texts(generation: Generation, skip_special_tokens: bool) -> list[str]:
    """What each token brought: bytes of one character that come in several tokens count for the last of them."""
    detokenizer = Detokenizer(generation.variant.tokenizer, skip_special_tokens=skip_special_tokens)
    texts = [detokenizer.add(token_id) for token_id in generation.token_ids]
    texts[-1] += detokenizer.flush()
    return texts
