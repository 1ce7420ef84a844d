"""What the server's engine is given to do, without a server."""

import time
from pathlib import Path

import torch

from server.engine.engine import Engine
from server.wire.messages import Abort, Generate, Sampling


def request(
    name: str, ids: list[int], new_tokens: int, state: Path | None = None, state_tokens: int = 0
) -> Generate:
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
    return Generate(
        request_id=name,
        token_ids=ids,
        max_tokens=new_tokens,
        sampling=greedy,
        stop_token_ids=[],
        state_path=None if state is None else str(state),
        state_tokens=state_tokens,
    )


def random_prompts(lengths: list[int], vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def full_speed(engine: Engine, batch: int, vocab: int, new_tokens: int, prompt: int = 16) -> float:
    """Tokens per second while all of `batch` requests of random prompts decode, with nothing else to do."""
    prompts = random_prompts([prompt] * batch, vocab)
    return speed_of(engine, [request(str(i), ids, new_tokens) for i, ids in enumerate(prompts)])


def speed_of(engine: Engine, requests: list[Generate]) -> float:
    """Tokens per second while all of these requests decode, with nothing else to do."""
    batch = len(requests)
    for message in requests:
        engine.handle(message)
    times: list[float] = []
    while not engine.idle:
        output = engine.step()
        if output is not None and output.phase == "decode" and output.batch_size == batch:
            times.append(time.perf_counter())
    return batch * (len(times) - 1) / (times[-1] - times[0])


def closed_loop_speed(
    engine: Engine, streams: int, vocab: int, prompt: int, new_tokens: int, ramp_s: float, seconds: float
) -> float:
    """Tokens per second of streams that each send a request when their last one has ended, in a window of so many
    seconds behind a ramp."""
    prompts = random_prompts([prompt] * 32, vocab)
    left: dict[str, int] = {}

    def send(number: int) -> None:
        left[str(number)] = new_tokens
        engine.handle(request(str(number), prompts[number % len(prompts)], new_tokens))

    for number in range(streams):
        send(number)
    sent, tokens = streams, 0
    begin = time.monotonic() + ramp_s
    end = begin + seconds
    while (now := time.monotonic()) < end:
        output = engine.step()
        for token in output.tokens if output else ():
            tokens += begin <= now
            left[token.request_id] -= 1
            if not left[token.request_id]:
                send(sent)
                sent += 1
    for name, more in left.items():
        if more:
            engine.handle(Abort(request_id=name))
    while not engine.idle:
        engine.step()
    return tokens / seconds
