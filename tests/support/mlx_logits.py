"""mlx-lm models of checkpoints on a CPU, in the environment of other people's clients: `python mlx_logits.py FOLDER`,
where `mlx_logits` (for tests) has written FOLDER/request.json.

mlx-lm has its own code for loading and for every layer, which makes it a second oracle beside transformers.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def mlx_logits(
    python: Path, directory: Path, checkpoints: dict[str, Path], ids: list[int]
) -> "dict[str, Tensor]":
    """Logits `[tokens, vocab]` of one sequence, by checkpoint.

    `python` is the interpreter that has mlx-lm; `directory` is for scratch files.
    """
    from safetensors.torch import load_file

    request = {"checkpoints": {name: str(path) for name, path in checkpoints.items()}, "ids": ids}
    (directory / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [str(python), __file__, str(directory)], capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"mlx-lm failed:\n{done.stderr[-4000:]}")
    return load_file(directory / "run.safetensors")


def _main(directory: Path) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    request = json.loads((directory / "request.json").read_text())
    result = {}
    for name, path in request["checkpoints"].items():
        model, _ = load_model(Path(path), lazy=False, strict=True)
        result[name] = model(mx.array([request["ids"]]))[0].astype(mx.float32)
    mx.save_safetensors(str(directory / "run.safetensors"), result)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
