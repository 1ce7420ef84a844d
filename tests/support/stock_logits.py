"""Stock transformers models of checkpoints on a CPU, in a process of their own.

Where fla can be imported, transformers gives these models its Triton kernels, GPU or not. So this process hides fla;
the tests' own process needs it.

Nothing here imports `modeling`: what comes out is transformers' own word.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class Stock:
    """What stock transformers says, by checkpoint."""

    problems: dict[str, str]
    """Why a checkpoint does not load, or what its loading report holds that must not be there."""
    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    """Logits of each sequence, `[tokens, vocab]`."""
    greedy: dict[str, list[list[int]]] = field(default_factory=dict)
    """The greedy continuation of each sequence by stock `generate` with its cache."""


def stock_logits(
    directory: Path, checkpoints: dict[str, Path], sequences: list[list[int]], new_tokens: int = 0
) -> Stock:
    """Load each checkpoint by its own architecture's class and as a language model alone, and run the sequences.

    `directory` is for scratch files. Starts this file as a subprocess, once for everything: the imports take seconds.
    """
    from safetensors.torch import load_file

    directory.mkdir(parents=True, exist_ok=True)
    request = {
        "checkpoints": {name: str(path) for name, path in checkpoints.items()},
        "sequences": sequences,
        "new_tokens": new_tokens,
    }
    (directory / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, __file__, str(directory)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"stock transformers failed:\n{done.stderr[-4000:]}")
    stock = Stock(json.loads((directory / "problems.json").read_text()))
    tensors = load_file(directory / "run.safetensors")
    for name in checkpoints.keys() - stock.problems.keys():
        stock.logits[name] = [tensors[f"{name}.{i}.logits"] for i in range(len(sequences))]
        stock.greedy[name] = [tensors[f"{name}.{i}.greedy"].tolist() for i in range(len(sequences))]
    return stock


def _load(path: Path, loader: Any) -> Any:
    """The model, in float32. Raises ValueError unless every tensor of model and checkpoint found its counterpart; those
    of a prediction head, and for a language model those of a vision tower, transformers leaves out itself."""
    import torch

    model, report = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    problems = {key: value for key, value in report.items() if value}
    if problems:
        raise ValueError(f"{type(model).__name__}: {problems}")
    model.eval()
    model.generation_config.eos_token_id = None
    return model


def _run(path: Path, sequences: list[list[int]], new_tokens: int) -> dict[str, Tensor]:
    import torch
    import transformers

    model = _load(path, transformers.AutoModelForCausalLM)
    (architecture,) = json.loads((path / "config.json").read_text())["architectures"]
    whole = None
    if architecture != type(model).__name__:
        whole = _load(path, getattr(transformers, architecture))
    result = {}
    for i, sequence in enumerate(sequences):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0].contiguous()
            generated = ids[0]
            if new_tokens:
                generated = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                )[0]
            # Of one sequence: it tells apart weights that were loaded and weights that were not.
            if (
                whole is not None
                and i == 0
                and not torch.equal(whole(ids, use_cache=False).logits[0], logits)
            ):
                raise ValueError(f"{architecture} and its language model alone differ")
        result |= {f"{i}.logits": logits, f"{i}.greedy": generated[len(sequence) :].contiguous()}
    return result


def _main(directory: Path) -> None:
    # An entry of None is a module that can't be imported.
    for name in ("fla", "causal_conv1d"):
        sys.modules[name] = None  # type: ignore[assignment]
    from safetensors.torch import save_file

    request = json.loads((directory / "request.json").read_text())
    problems: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, path in request["checkpoints"].items():
        try:
            run = _run(Path(path), request["sequences"], request["new_tokens"])
        except Exception as e:  # the others are still asked
            problems[name] = repr(e)
        else:
            tensors |= {f"{name}.{key}": t for key, t in run.items()}
    (directory / "problems.json").write_text(json.dumps(problems))
    save_file(tensors, directory / "run.safetensors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
