"""POST /v1/compare: one prompt through two or more variants, side by side."""

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.ab.record import ABRecord, record_of
from server.api.ab.schemas import CompareRequest
from server.api.ab.scoring import Scores, pair_of, same_vocabulary, score, score_bytes
from server.api.completions.generation import Generation
from server.api.completions.prepare import checked_allowed, checked_bias, generate_message
from server.api.http.aside import aside
from server.api.http.bodies import JSONRoute
from server.api.http.encoding import json_response
from server.api.http.errors import APIError, from_engine
from server.api.http.events import DONE, EventStream, sse
from server.api.http.tasks import merged, unless_disconnected
from server.api.serving.prompts import encode_prompt
from server.api.serving.service import Origin, Service, origin_of, service_of
from server.api.serving.variants import Variant
from server.settings import Settings
from server.text.detokenizer import Detokenizer
from server.wire.exchange import EngineError
from server.wire.hub import NextOrder

router = APIRouter(route_class=JSONRoute)


@router.post("/v1/compare")
async def compare(body: CompareRequest, request: Request) -> Response:
    """Complete the prompt with each variant and measure the others against the baseline, streaming or not."""
    service = service_of(request)
    variants = _chosen(service, body)
    with contextlib.ExitStack() as stack:
        for variant in variants:
            stack.enter_context(await service.admit(variant))
        _check_comparable(service.settings, body, variants)
        comparison = Comparison(
            service,
            record_of(request),
            body,
            variants,
            await _encoded(body, variants),
            origin_of(request, "compare", priority=body.priority, salt=body.cache_salt),
        )
        if body.stream:
            return EventStream(_stream(comparison), on_end=stack.pop_all().close)
        try:
            return json_response(await unless_disconnected(request, comparison.run()))
        except EngineError as e:
            raise from_engine(e) from e


def _chosen(service: Service, body: CompareRequest) -> list[Variant]:
    """The baseline and the variants to compare with it. 400 if they can't be compared."""
    names = body.variants or service.variants.names
    if len(set(names)) < 2:
        raise APIError(400, f"variants: two different ones are needed, got {names}", param="variants")
    if len(set(names)) != len(names):
        raise APIError(400, f"variants: each may appear once, got {names}", param="variants")
    chosen = [service.named(name, "variants") for name in names]
    baseline = chosen[0] if body.baseline is None else service.named(body.baseline, "baseline")
    if baseline not in chosen:
        raise APIError(
            400, f"baseline: {baseline.name!r} is not among the variants {names}", param="baseline"
        )
    return [baseline, *(variant for variant in chosen if variant is not baseline)]


def _check_comparable(settings: Settings, body: CompareRequest, variants: list[Variant]) -> None:
    """400 unless all have one tokenizer and each token that the request names, and the log-probabilities fit. They
    have loaded."""
    baseline, *others = variants
    for variant in others:
        if not same_vocabulary(baseline, variant):
            raise APIError(
                400,
                f"variants: {variant.name!r} has another tokenizer or vocabulary size than {baseline.name!r}",
                param="variants",
            )
    checked_bias(body, baseline)
    checked_allowed(body, baseline)
    if score_bytes(body.token_limit, baseline) > settings.compare_bytes:
        most = settings.compare_bytes // score_bytes(1, baseline)
        raise APIError(
            400,
            f"max_tokens: at most {most} in a comparison of these variants, got {body.token_limit}",
            param="max_tokens",
        )


async def _encoded(body: CompareRequest, variants: list[Variant]) -> dict[str, list[int]]:
    """Token ids of the prompt by variant name. 400 if it is no good."""
    ids = {
        variant.name: await encode_prompt(
            variant,
            body.prompt,
            body.token_limit,
            special=body.add_special_tokens is not False,
            last=body.truncate_prompt_tokens,
        )
        for variant in variants
    }
    # Prompts that were cut to fit differ where contexts do: all are cut to the shortest.
    least = min(map(len, ids.values()))
    return {name: each[-least:] for name, each in ids.items()}


async def _stream(comparison: "Comparison") -> AsyncGenerator[bytes]:
    """Events of the variants as they come, then the whole answer, [DONE]."""
    try:
        async with contextlib.aclosing(comparison.events()) as events:
            async for event in events:
                yield sse(event)
    except EngineError as e:
        yield sse(from_engine(e).body())
    except APIError as e:
        yield sse(e.body())
    yield DONE


Event = dict[str, Any]


class Comparison:
    """One comparison under way: each variant completes the prompt, then each scores the baseline's completion. Take its
    `events` or `run` it, once.

    Args:
        record: told what was measured.
        variants: the baseline first.
        prompt_ids: token ids of the prompt by variant name (`_encoded`).
    """

    def __init__(
        self,
        service: Service,
        record: ABRecord,
        body: CompareRequest,
        variants: list[Variant],
        prompt_ids: dict[str, list[int]],
        origin: Origin,
    ) -> None:
        self._service = service
        self._record = record
        # With one seed for all, sampled answers differ only where the distributions do. The answer says which it was:
        # 53 bits are as many as JavaScript can read.
        self._body = body.model_copy(
            update={"seed": secrets.randbits(53) if body.seed is None else body.seed}
        )
        self._variants = variants
        self._prompt_ids = prompt_ids
        self._origin = origin
        self._parallel = bool(body.parallel)
        self._generations: dict[str, Generation] = {}
        self._head = {"id": f"cmp-{secrets.token_hex(12)}", "created": int(time.time())}

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
            together = merged([self._generate(v, self._origin.arrived) for v in self._variants])
            async with contextlib.aclosing(together) as tagged:
                async for _, event in tagged:
                    yield event
        else:
            number = await self._service.link.ask(NextOrder())
            # Whoever goes first finds cold caches.
            order = self._variants[:: -1 if number % 2 == 0 else 1]
            for variant in order:
                begins = self._origin.arrived if variant is order[0] else time.monotonic()
                async with contextlib.aclosing(self._generate(variant, begins)) as events:
                    async for event in events:
                        yield event
        base = self._generations[self._variants[0].name]
        async with self._record.scoring():
            scores = await score(
                self._service.link.runtime_dir,
                self._variants,
                base.prompt_ids,
                base.token_ids,
                priority=min(self._origin.priority, 0),  # other comparisons wait for this one to be over
                salt=self._origin.salt,
            )
        yield self._answer(base, scores, await aside(self._token_texts))

    async def _generate(self, variant: Variant, begins: float) -> AsyncGenerator[Event]:
        origin = self._origin
        message = generate_message(
            self._body,
            variant,
            self._prompt_ids[variant.name],
            origin,
        )
        generation = Generation(
            variant,
            self._body,
            message,
            replace(origin, arrived=begins),
            most_unread=self._service.settings.stream_buffer_bytes / len(self._variants),
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
            "state_bytes_ratio": other.held.total / base.held.total,
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
        pair = pair_of(names[0], names[1], scores, "compare", **timings)
        self._record.add_pair(pair)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _first_divergence(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that only one of them has there; None if there is none."""
    pairs = zip(a, b, strict=False)
    different = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    return min(len(a), len(b)) if different is None and len(a) != len(b) else different


def _token_texts(generation: Generation, skip_special_tokens: bool) -> list[str]:
    """What each token brought: bytes of one character that come in several tokens count for the last of them."""
    detokenizer = Detokenizer(generation.variant.text.token_texts, skip_special_tokens=skip_special_tokens)
    texts = [detokenizer.add(token_id) for token_id in generation.token_ids]
    texts[-1] += detokenizer.flush()
    return texts
