"""What the serving benchmarks share: a server process, requests, engines in this process."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from loadtest.client import Completion
from modeling.checkpoint import open_checkpoint
from pruning.surgery import Cut, write_reduced

MODEL = Path(__file__).parents[1] / "demo" / "model"


def variants(directory: Path, model: Path = MODEL) -> dict[str, Path]:
    """The model, and the same with half of its key channels. Which ones does not matter to its speed."""
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


class Server:
    """A `lowkey-serve` process on a free port.

    Args:
        script: another checkout's `lowkey-serve` than the one beside this Python.
    """

    def __init__(self, checkpoints: dict[str, Path], *options: str, script: Path | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self.log = Path(self._directory.name) / "log"
        script = script or Path(sys.executable).parent / "lowkey-serve"
        arguments = [f"{name}={path}" for name, path in checkpoints.items()]
        with self.log.open("wb") as f:
            self.process = subprocess.Popen(
                [str(script), *arguments, "--port", "0", *options], stdout=f, stderr=f, env={**os.environ}
            )
        self.url = self._wait(lambda: re.search(r"running on (http://\S+)", self.log.read_text()))[1]
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self._wait(lambda: self.http.get("/ready").status_code == 200)

    def _wait(self, condition: Any, seconds: float = 180.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.1)
        return value

    def engines(self) -> dict[str, psutil.Process]:
        """Engine processes by variant."""
        found = {}
        for process in psutil.Process(self.process.pid).children():
            match = re.search(r'"variant":"([^"]+)"', " ".join(process.cmdline()))
            if match:
                found[match[1]] = process
        return found

    def cpu_seconds(self) -> float:
        """Processor time of the API process so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
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
