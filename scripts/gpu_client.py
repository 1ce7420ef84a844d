"""One process of gpu_check's load: `gpu_client.py URL MODEL STREAMS VOCAB NEW_TOKENS`, two requests a stream; JSON."""

import asyncio
import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest.client import Completion, closed_loop


def main() -> None:
    url, model = sys.argv[1:3]
    streams, vocab, new_tokens = map(int, sys.argv[3:])
    draw = random.Random(os.getpid())
    completions = [
        Completion([draw.randrange(vocab) for _ in range(64)], new_tokens) for _ in range(2 * streams)
    ]
    began = time.monotonic()
    results, _ = asyncio.run(closed_loop(url, model, completions, streams, temperature=0))
    figures = {
        "began": began,
        "ended": time.monotonic(),
        "tokens": sum(r.tokens for r in results),
        "errors": sum(r.error is not None for r in results),
        "cpu": time.process_time(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
