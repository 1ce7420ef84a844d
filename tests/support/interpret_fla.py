"""Stock flash-linear-attention models on a machine without a GPU, in a process of their own.

fla's kernels are Triton only. Triton's interpreter runs them on the CPU, but fla's autotuner asks for a GPU driver,
so one is pretended, whose benchmark calls every configuration equally fast. Good for a few tokens of a tiny model
under no_grad (a tenth of a second per token and layer); past 64 tokens fla takes its chunk kernels, which the
interpreter can't run.

Nothing here imports `modeling`: what comes out is fla's own word.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

MAX_TOKENS = 64


@dataclass
class Stock:
    """What stock fla says."""

    shapes: dict[str, dict[str, list[int]]]
    """Shape of every tensor that the stock model would save, for each config."""
    logits: dict[str, Tensor] = field(default_factory=dict)
    """Logits of the prompt, `[tokens, vocab]`, by checkpoint."""
    ids: dict[str, list[int]] = field(default_factory=dict)
    """The greedy continuation by stock `generate` with its cache, by checkpoint."""


def ask_stock_fla(
    directory: Path,
    *,
    configs: dict[str, dict[str, Any]] | None = None,
    checkpoints: dict[str, Path] | None = None,
    prompt: list[int] | None = None,
    new_tokens: int = 4,
) -> Stock:
    """Build the stock models of `configs` (on the meta device) and run those of `checkpoints` on `prompt`.

    `directory` is for scratch files. Starts this file as a subprocess, once for everything: the imports take seconds.
    """
    prompt = prompt or []
    if len(prompt) + new_tokens > MAX_TOKENS:
        raise ValueError(f"{len(prompt)} + {new_tokens} tokens; the interpreter runs at most {MAX_TOKENS}")
    from safetensors.torch import load_file

    request = {
        "configs": configs or {},
        "checkpoints": {name: str(path) for name, path in (checkpoints or {}).items()},
        "prompt": prompt,
        "new_tokens": new_tokens,
    }
    (directory / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, __file__, str(directory)],
        env=os.environ | {"TRITON_INTERPRET": "1", "FLA_CACHE_RESULTS": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"stock fla failed:\n{done.stderr[-4000:]}")
    stock = Stock(json.loads((directory / "shapes.json").read_text()))
    if request["checkpoints"]:
        tensors = load_file(directory / "run.safetensors")
        for name in request["checkpoints"]:
            stock.logits[name] = tensors[f"{name}.logits"]
            stock.ids[name] = tensors[f"{name}.ids"].tolist()
    return stock


class _Utils:
    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        return {"multiprocessor_count": 1, "max_shared_mem": 232448}


class _NoGpuDriver:
    """Answers what Triton's autotuner asks of a driver."""

    utils = _Utils

    def get_benchmarker(self) -> Any:
        return lambda kernel, *args, quantiles=(0.5,), **kwargs: [0.0] * len(quantiles)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_current_target(self) -> Any:
        raise RuntimeError("no GPU")  # fla takes this for "roll back to CPU"


def _stock_shapes(configs: dict[str, dict[str, Any]], target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    result = {}
    for name, config in configs.items():
        model_type = config["model_type"]
        stock = AutoConfig.for_model(**config)
        assert stock.model_type == model_type
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stock)
        state = model.state_dict()
        if stock.tie_word_embeddings:
            # save_pretrained leaves the second name of a shared tensor out; on the meta device all share nothing.
            assert model.lm_head.weight is model.model.embeddings.weight
            del state["lm_head.weight"]
        result[name] = {key: list(t.shape) for key, t in state.items()}
    target.write_text(json.dumps(result))


def _stock_run(request: dict[str, Any], target: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    result = {}
    ids = torch.tensor([request["prompt"]])
    for name, path in request["checkpoints"].items():
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        problems = {key: value for key, value in report.items() if value}
        assert not problems, problems
        model.eval()
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            result[f"{name}.logits"] = model(ids, use_cache=False).logits[0].contiguous()
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request["new_tokens"],
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        result[f"{name}.ids"] = generated[0, ids.shape[1] :].contiguous()
    save_file(result, target)


def _main(directory: Path) -> None:
    from triton.runtime import driver

    driver.set_active(_NoGpuDriver())
    import fla  # noqa: F401 (registers its models with transformers)

    request = json.loads((directory / "request.json").read_text())
    _stock_shapes(request["configs"], directory / "shapes.json")
    if request["checkpoints"]:
        _stock_run(request, directory / "run.safetensors")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
