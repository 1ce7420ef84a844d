"""llama.cpp in a process of its own, driven through llama-cpp-python's bindings; llama.py starts it.

It reads one JSON object a line and answers with one a line. A process of its own keeps its OpenMP and its waiting
between steps as they are by default, which ours are not, and what it imports out of ours.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import llama_cpp
import numpy as np

N_BATCH = 2048


class Context:
    """Sequences of one model: each its own states, keys and values.

    Args:
        threads: of decoding and prefill alike.
        sequences: how many there are, beside one that is kept for copies.
        tokens: most of each.
    """

    def __init__(self, model: str, threads: int, sequences: int, tokens: int) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp can't load {model}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        params = llama_cpp.llama_context_default_params()
        self._kept = sequences  # number of one sequence more
        params.n_seq_max = sequences + 1
        params.n_ctx = (sequences + 1) * ((tokens + 255) // 256 * 256)
        params.n_batch = N_BATCH
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp can't make a context of {sequences} x {tokens} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)

    def keep(self, prompt: list[int]) -> None:
        """Forget everything but this prompt, for copies."""
        self.clear()
        self.feed((token, i, self._kept, i == len(prompt) - 1) for i, token in enumerate(prompt))

    def copy(self, sequences: int) -> None:
        """Make that many sequences copies of what is kept."""
        for i in range(sequences):
            llama_cpp.llama_memory_seq_rm(self._memory, i, -1, -1)
            llama_cpp.llama_memory_seq_cp(self._memory, self._kept, i, -1, -1)

    def feed(self, tokens: Iterable[tuple[int, int, int, bool]]) -> None:
        """Tokens as (id, position, sequence, whether its logits are needed)."""
        tokens = list(tokens)
        for start in range(0, len(tokens), N_BATCH):
            some = tokens[start : start + N_BATCH]
            b = self._batch
            b.n_tokens = len(some)
            for i, (token, position, sequence, wanted) in enumerate(some):
                b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0] = token, position, 1, sequence
                b.logits[i] = wanted
            code = llama_cpp.llama_decode(self._context, b)
            if code:
                raise SystemExit(f"llama_decode returned {code}")
        llama_cpp.llama_synchronize(self._context)

    def logits(self, row: int) -> np.ndarray:
        """The logits after the token that was in place `row` of the last batch, `[vocab]`."""
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).copy()


def main() -> None:
    # What llama.cpp itself prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    settings = json.loads(sys.argv[1])
    context = Context(**settings)
    clock = time.process_time if settings["threads"] == 1 else time.perf_counter
    lengths: list[int] = []
    kept = 0
    answers.write(json.dumps({"vocab_size": context.vocab_size}) + "\n")
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        match command["do"]:
            case "prefill":  # from nothing
                prompts = command["prompts"]
                context.clear()
                tokens = [
                    (token, i, sequence, i == len(prompt) - 1)
                    for sequence, prompt in enumerate(prompts)
                    for i, token in enumerate(prompt)
                ]
                began = clock()
                context.feed(tokens)
                answer["seconds"] = clock() - began
                lengths = [len(prompt) for prompt in prompts]
                if command.get("logits"):
                    np.save(command["logits"], context.logits(-1)[None])
            case "keep":
                context.keep(command["prompt"])
                kept = len(command["prompt"])
            case "copy":
                context.copy(command["sequences"])
                lengths = [kept] * command["sequences"]
            case "decode":  # one token of each sequence, for each row of ids
                began = clock()
                for ids in command["ids"]:
                    context.feed((token, n, i, True) for i, (token, n) in enumerate(zip(ids, lengths)))  # noqa: B905
                    lengths = [n + 1 for n in lengths]
                answer["seconds"] = clock() - began
                if command.get("logits"):
                    rows = [context.logits(i) for i in range(len(lengths))]
                    np.save(command["logits"], np.stack(rows))
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
