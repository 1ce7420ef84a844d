"""Pruning on the card: calibration and evaluation of a hybrid by `lowkey-prune`, and calibration of a larger one that
goes through the card layer by layer. With arguments this file is such a command itself, watched:

    python scripts/gpu_pruning.py FIGURES.json calibrate CHECKPOINT STATISTICS --device cuda
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_common import Run

MANY = 131_072
"""Tokens that times are told for; what is measured are fewer."""
LAYERS = 16
"""How many of a 27B's 64 layers are written: all of them take more room than the disk of a common machine has."""


def watch(figures: Path, arguments: list[str]) -> None:
    """Run `lowkey-prune`; when it was how far, and the most memory that it took."""
    began = time.monotonic()
    import torch

    from pruning.cli import app
    from pruning.progress import Meter

    steps: list[tuple[float, int]] = []
    advance = Meter.advance

    def counted(self: Meter, tokens: int) -> None:
        advance(self, tokens)
        steps.append((time.monotonic(), tokens))

    Meter.advance = counted  # type: ignore[method-assign]
    sys.argv = ["lowkey-prune", *arguments]
    try:
        app()
    finally:
        found = {
            "seconds": time.monotonic() - began,
            "steps": len(steps),
            "work_s": steps[-1][0] - steps[0][0] if steps else 0.0,
            "tokens": sum(tokens for _, tokens in steps),
            "tokens_after_first": sum(tokens for _, tokens in steps[1:]),
            "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device": torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else 0,
        }
        figures.write_text(json.dumps(found))


def prune(run: "Run", label: str, arguments: list[str], passes: int, scale: float = 1.0) -> list[str]:
    """A command's row. `passes`: how often each token is counted. `scale`: how many times as much work the whole model
    would be."""
    figures, log = run.folder / "pruning.json", run.folder / "pruning.log"
    figures.unlink(missing_ok=True)
    left = max(min(run.section_end, run.deadline) - time.monotonic(), 5)
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with log.open("w") as file:
        ended = subprocess.run(
            [sys.executable, __file__, str(figures), *arguments, "--device", run.device],
            env=os.environ | {"PYTHONPATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=None if run.small else left,
            check=False,
        )
    if ended.returncode or not figures.exists():
        run.report.setdefault("pruning", {})[f"log, {label}"] = log.read_text()[-4000:]
        return [label, run.check(False, f"pruning {label}"), log.read_text()[-600:]]
    found: dict[str, Any] = json.loads(figures.read_text())
    run.report.setdefault("pruning", {})[label] = found
    told = f"{found['seconds']:.1f} s"
    if found["tokens_after_first"] and found["work_s"]:
        per_token = found["work_s"] / found["tokens_after_first"] * passes
        start = found["seconds"] - per_token * found["tokens"] / passes
        found["tokens_per_second"] = 1 / per_token / scale
        found["minutes_for_many"] = scale * (start + per_token * MANY) / 60
        told += (
            f", of which {start:.1f} s are not tokens; {found['tokens_per_second']:.0f} tokens/s, "
            f"{found['minutes_for_many']:.1f} min for {MANY:,} tokens{' by extrapolation' if scale > 1 else ''}"
        )
    told += f"; peak {found['peak_device'] / 1e9:.1f} GB on the card, {found['peak_resident'] / 1e9:.1f} GB resident"
    return [label, run.check("tokens_per_second" in found, f"pruning {label}: no rate"), told]


def check_pruning(run: "Run") -> Iterator[list[str]]:
    """The main shape whole, then the large one in a stream."""
    from gpu_hybrid_server import checkpoints, write_hybrid
    from gpu_hybrid_speed import main_shape
    from gpu_models import free

    from benchmarks.hybrid_models import config_of

    source = str(checkpoints(run)[run.widths[0]].path)
    shape = main_shape(run)
    # Each is several batches, since the time of the first one is not told from the start's.
    tokens, scored, window = ("256", "256", "32") if run.small else ("16384", "65536", "512")
    text = ["--tokens", tokens, "--window-length", window]
    run.need(30)
    yield prune(
        run, f"{shape}, calibrate", ["calibrate", source, str(run.folder / "a.stats.safetensors"), *text], 1
    )
    run.need(30)
    perplexity = ["evaluate", source, "--tokens", scored, "--window", window, "--part", "perplexity"]
    yield prune(run, f"{shape}, evaluate", perplexity, 1)
    run.need(30)
    gradients = [
        "calibrate",
        source,
        str(run.folder / "b.stats.safetensors"),
        *text,
        "--method",
        "loss-aware",
    ]
    yield prune(run, f"{shape}, calibrate with gradients", gradients, 2)
    run.need(60)
    config = config_of("tiny" if run.small else "27B", 16 if run.small else 128)
    whole = config["num_hidden_layers"]
    layers = whole if run.small else LAYERS
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    began = time.monotonic()
    large = run.folder / "large"
    write_hybrid(run, large, config)
    free(run)
    yield ["27B", "", f"{layers} of {whole} layers written in {time.monotonic() - began:.1f} s"]
    streamed = ["calibrate", str(large), str(run.folder / "c.stats.safetensors"), *text, "--stream-layers"]
    # Tokens are counted once for each layer that they go through, which the last one, of softmax attention, is not.
    scale = (whole - 1) / (layers - 1)
    yield prune(run, f"27B, {layers} layers in a stream", streamed, layers - 1, scale)


if __name__ == "__main__":
    watch(Path(sys.argv[1]), sys.argv[2:])
