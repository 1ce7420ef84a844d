"""A `lowkey-serve` process on a free port, for all that drives a real server: benchmarks, the check of a GPU, tests."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    import psutil  # the machine that a GPU is checked on may lack it

LOWKEY_SERVE = (str(Path(sys.executable).with_name("lowkey-serve")),)
"""The command of this environment."""


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far, in steps of the system's clock (usually 10 ms)."""
    return sum(_times(pid))


def kernel_seconds(pid: int) -> float:
    """The part of `cpu_seconds` that the kernel took: what a process asked of it, above all to send and receive."""
    return _times(pid)[1]


def _times(pid: int) -> tuple[float, float]:
    """Seconds that a process ran its own code, and that the kernel ran for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / ticks, int(fields[12]) / ticks


class ServerProcess:
    """The process, its log, and a client.

    Args:
        arguments: What `lowkey-serve` is given beside its port.
        log: File that gets all that the process says; its folder is the process's working directory.
        command: What is run, where it is not this environment's `lowkey-serve`.
        environment: Variables beside those of this process.
        timeout_s: How long any single thing may take.
        waiting: Called again and again during every wait. What it raises ends the wait.

    Raises:
        RuntimeError: The server did not start. The message holds its log.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        command: Sequence[str] = LOWKEY_SERVE,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 180.0,
        waiting: Callable[[], object] = lambda: None,
    ) -> None:
        self.log = log
        self._timeout_s, self._waiting = timeout_s, waiting
        with log.open("wb") as f:
            self.process = subprocess.Popen(
                [*command, *arguments, "--port", "0"],
                stdout=f,
                stderr=f,
                cwd=log.parent,
                env={**os.environ, **(environment or {})},
            )
        try:
            self.url: str = self._wait(lambda: re.search(r"running on (http://\S+)", log.read_text()))[1]
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=timeout_s)

    def wait_ready(self, *variants: str) -> None:
        """Wait until any variant, or each of `variants`, answers requests. Raises RuntimeError if none ever does."""
        for path in [f"/ready?variant={name}" for name in variants] or ["/ready"]:
            self._wait(lambda path=path: self.http.get(path).status_code == 200)

    def _wait(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + self._timeout_s
        while not (value := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            self._waiting()
            time.sleep(0.1)
        return value

    def engines(self) -> dict[str, "psutil.Process"]:
        """Engine processes by variant."""
        import psutil

        found = {}
        for process in psutil.Process(self.process.pid).children():
            match = re.search(r'"variant":"([^"]+)"', " ".join(process.cmdline()))
            if match:
                found[match[1]] = process
        return found

    def api_processes(self) -> list[int]:
        """Ids of the processes that serve the API: all that were started here but the engines."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(stat.parent.name))
        found, left = [], [self.process.pid]
        while left:
            pid = left.pop()
            with contextlib.suppress(OSError):
                if b'"variant":"' not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
                    left += children.get(pid, [])
        return found

    def cpu_seconds(self) -> float:
        """Processor time of the API's processes so far."""
        return sum(map(cpu_seconds, self.api_processes()))

    def kernel_seconds(self) -> float:
        """The part of it that the kernel took."""
        return sum(map(kernel_seconds, self.api_processes()))

    def stop(self, patience_s: float = 60.0) -> None:
        """Send SIGTERM, and SIGKILL after `patience_s` seconds."""
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
