"""Answers that are held to grammars, by the server's engine on the card."""

import json
import re
from collections.abc import Iterator

import torch
from gpu_common import (
    FAMILIES,
    Run,
    config,
    large_config,
    make_checkpoint,
    random_model,
    tokenizer_of,
    write_checkpoint,
)
from gpu_engine import make_engine, waits_counted
from gpu_loads import random_prompts, speed_of
from gpu_models import free, parity_size

from benchmarks.structured import widened
from lowkey.publishing import new_directory
from modeling.checkpoint import Checkpoint
from modeling.families import family_of
from modeling.tokenizer import TokenizerFile
from server.engine.engine import Engine
from server.text import grammar
from server.wire.messages import Generate, Sampling

REGEX = r"[a-z]{3,9}( [a-z]{3,9}){2}[.!]"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "bc"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["kind", "ages"],
    "additionalProperties": False,
}
ENDLESS = {"type": "array", "items": {"type": "string"}, "minItems": 9999}
"""No answer ends before its last token, and most masks have nearly all tokens in them."""
WIDE = 248_320
"""Tokens of Qwen3.5's vocabulary."""
STOP = 0


def held(name: str, ids: list[int], new_tokens: int, text: str, stop: int = STOP) -> Generate:
    """A request that draws, held to a grammar unless that is empty, which then ends by the token `stop`."""
    how = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=len(name))
    return Generate(
        request_id=name,
        token_ids=ids,
        max_tokens=new_tokens,
        sampling=how,
        stop_token_ids=[stop] if text else [],
        grammar=text,
    )


def check_grammars(run: Run) -> Iterator[list[str]]:
    """Every answer keeps to its grammar beside requests that have none, and nothing but a collect waits."""
    checkpoint = make_checkpoint(
        run.folder / "grammars", config(FAMILIES[0], d_k=parity_size(run)["d_v"], **parity_size(run))
    )
    tokenizer, _ = TokenizerFile(checkpoint.path).open()
    count = 2 if run.small else 16
    grammars = {"json": grammar.json_schema(SCHEMA), "regex": grammar.regex(REGEX), "free": ""}
    for way, graphs in (("graphs", True), ("eager", False)):
        run.need(10)
        engine, _ = make_engine(
            run,
            checkpoint,
            "float32",
            state_dtype="float32",
            requests=8 * count,
            graphs=graphs,
            state_memory=2**28,
        )
        prompts = random_prompts([7] * 3 * count, checkpoint.spec.vocab_size)
        messages = [
            held(f"{kind} {number}", prompts.pop(), 300 if text else 20, text)
            for number in range(count)
            for kind, text in grammars.items()
        ]
        run_all(engine, messages)  # compiled and tuned, the next time counts
        with waits_counted(run, engine) as waits:
            answers, failures = run_all(engine, messages)
        texts = {
            name: tokenizer.decode(tokens[:-1], skip_special_tokens=False) for name, tokens in answers.items()
        }
        wrong = [
            name
            for name, text in texts.items()
            if (name.startswith("regex") and re.fullmatch(REGEX, text) is None)
            or (name.startswith("json") and answers[name][-1] == STOP and not _valid(text))
        ]
        ended = sum(tokens[-1] == STOP for name, tokens in answers.items() if not name.startswith("free"))
        run.report.setdefault("grammars", {})[way] = {"wrong": wrong, "failures": failures, "waits": waits}
        good = not wrong and not failures and not any(waits.values()) and ended > 0
        details = (
            f"{ended} of {2 * count} ended, wrong: {wrong}, failures: {failures}, waits in launches: {waits}"
        )
        yield [f"grammars {way}", run.check(good, f"grammars {way}"), details]
        del engine
        free(run)


def run_all(engine: Engine, messages: list[Generate]) -> tuple[dict[str, list[int]], list[str]]:
    """The tokens of each request, and why some have failed."""
    tokens: dict[str, list[int]] = {}
    failures: list[str] = []
    for message in messages:
        engine.handle(message)
    while not engine.idle:
        output = engine.step()
        for token in output.tokens if output else ():
            tokens.setdefault(token.request_id, []).append(token.token_id)
        failures += [failed.error for failed in (output.failed if output else ())]
    return tokens, failures


def _valid(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    ages = value["ages"]
    return value["kind"] in ("a", "bc") and len(ages) <= 3 and all(0 <= age <= 99 for age in ages)


def check_grammar_speed(run: Run) -> Iterator[list[str]]:
    """Tokens per second of the engine with and without a schema, by batch and vocabulary."""
    results = run.report.setdefault("grammar_speed", {})
    for vocab in (257, 300) if run.small else (32_000, WIDE):
        run.need(40)
        free(run)
        checkpoint = _checkpoint(run, vocab)
        free(run)
        # No string in JSON has a line break, just as none has the end of a text that models have.
        stop = TokenizerFile(checkpoint.path).open()[0].token_to_id("Ċ")
        batches = (1, 2) if run.small else (1, 32, 128, 256)
        dtype = "float32" if run.small else "bfloat16"
        engine, _ = make_engine(run, checkpoint, dtype, state_dtype="float32", requests=batches[-1])
        for batch in batches:
            run.need(8)
            speeds: dict[str, float] = {}
            for name, text in (("plain", ""), ("schema", grammar.json_schema(ENDLESS, compact=True))):
                _speed(engine, batch, vocab, 8, text, stop)
                speeds[name] = _speed(engine, batch, vocab, 10 if run.small else 100, text, stop)
            more_us = (1 / speeds["schema"] - 1 / speeds["plain"]) * 1e6
            results[f"vocab {vocab} B {batch}"] = speeds | {"more_us_a_token": more_us}
            told = f"{speeds['plain']:.0f} tok/s, with a schema {speeds['schema']:.0f}: {more_us:.1f} us more a token"
            yield [f"grammar speed vocab {vocab} B {batch}", "", told]
        del engine
    free(run)


def _checkpoint(run: Run, vocab: int) -> Checkpoint:
    """The 1.3 B shape with this vocabulary, whose first 32,000 tokens are real ones."""
    path = run.folder / f"grammar-{vocab}"
    settings = large_config(run, FAMILIES[0], 128) | {"vocab_size": vocab}
    model = random_model(family_of(settings).spec(settings), run, torch.bfloat16)
    with new_directory(path) as directory:
        if vocab < WIDE:
            write_checkpoint(directory, settings, model.cpu())
        else:
            write_checkpoint(directory, settings, model.cpu(), widened(tokenizer_of(32_000), vocab))
    return Checkpoint(path)


def _speed(engine: Engine, batch: int, vocab: int, new_tokens: int, text: str, stop: int) -> float:
    prompts = random_prompts([16] * batch, vocab)
    return speed_of(engine, [held(str(i), ids, new_tokens, text, stop) for i, ids in enumerate(prompts)])
