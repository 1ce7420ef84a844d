"""What the serving benchmarks share: checkpoints, a server, requests, tables."""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from server_process import LOWKEY_SERVE, ServerProcess

from loadtest.client import Completion
from modeling.checkpoint import open_checkpoint
from pruning.surgery import Cut, write_reduced
from server.wire.messages import Sampling

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, seed=0)
MODEL = Path(__file__).parents[1] / "demo" / "model"


def variants(directory: Path, model: Path = MODEL) -> dict[str, Path]:
    """A model, and the same with half of its key channels, by variant. Which channels does not matter to the speed."""
    import torch

    checkpoint = open_checkpoint(str(model))
    reduced = directory / "reduced"
    reduced.mkdir(parents=True)
    keep = [
        (i, torch.arange(0, mixer.d_k, 2).expand(mixer.num_k_heads, -1).contiguous())
        for i, mixer in checkpoint.spec.deltas.items()
    ]
    write_reduced(checkpoint, [Cut(i, k) for i, k in keep], reduced)
    return {"dense": model, "reduced": reduced}


def workload(
    n: int, vocab: int, prompts: tuple[int, int], new: tuple[int, int], seed: int = 0
) -> list[Completion]:
    """Random requests with lengths between the given ones, inclusive."""
    draw = random.Random(seed)
    return [
        Completion(
            [draw.randrange(1, vocab) for _ in range(draw.randint(*prompts))],
            draw.randint(*new),
        )
        for _ in range(n)
    ]


class Server(ServerProcess):
    """A server that is ready, with its log in a folder of its own.

    Args:
        checkpoints: Directories by the names of their variants.
        options: Options of `lowkey-serve`.
        script: Another checkout's `lowkey-serve` than the one beside this Python.
    """

    def __init__(self, checkpoints: dict[str, Path], *options: str, script: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        super().__init__(
            [*(f"{name}={path.absolute()}" for name, path in checkpoints.items()), *options],
            Path(self._directory.name) / "log",
            command=LOWKEY_SERVE if script is None else [str(script.absolute())],
        )
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self, patience_s: float = 40.0) -> None:
        super().stop(patience_s)
        self._directory.cleanup()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
