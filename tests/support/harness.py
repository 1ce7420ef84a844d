"""lm-evaluation-harness against a server, and the same figures without either."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from live_server import DEADLINE_S
from torch import Tensor

from modeling.model import Model


def run_harness(
    clients: Path,
    directory: Path,
    tasks: Sequence[str],
    include: Path,
    *,
    model: str,
    url: str,
    tokenizer: Path,
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """Results and samples by task.

    Args:
        clients: folder of its command.
        directory: where it runs and writes; the results of another model stay there.
        include: folder of the tasks.
    """
    arguments = {
        "model": model,
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(tokenizer),
        "tokenized_requests": "True",
        "num_concurrent": "2",
        "max_retries": "1",
        "max_length": "4096",
    }
    out = directory / f"out-{model}"
    command = [
        *(str(clients / "lm-eval"), "run", "--model", "local-completions", "--batch_size", "4"),
        *("--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())),
        *("--tasks", ",".join(tasks), "--include_path", str(include)),
        *("--output_path", str(out), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    run = subprocess.run(
        ["env", *(f"{k}={v}" for k, v in offline.items()), *command],
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
        cwd=directory,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (results,) = out.rglob("results_*.json")
    samples = {}
    for task in tasks:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        samples[task] = [json.loads(line) for line in file.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


@torch.inference_mode()
def logprobs(model: Model, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of each token after the first, and whether each is the likeliest; by `modeling` alone."""
    hidden, _ = model(torch.tensor(ids), [0, len(ids)])
    rows = model.logits(hidden[:-1]).double().log_softmax(-1)
    targets = torch.tensor(ids[1:])
    return rows.gather(1, targets[:, None]).squeeze(1), rows.argmax(-1) == targets
