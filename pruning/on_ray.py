"""Calibration on a Ray cluster: shards of one draw, run where there is room and added up. Needs the extra `ray`."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowkey import how_to_install
from modeling.checkpoint import open_checkpoint
from pruning.calibration import Origin, take_shard
from pruning.collection import collect
from pruning.errors import PruningError
from pruning.progress import Advance
from pruning.statistics import StatisticName, Statistics, merge

RETRIES = 3
"""How often a shard is started again whose process or machine went away."""
POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """What every shard has in common."""

    source: str
    device: str
    needed: tuple[StatisticName, ...]
    shards: int
    threads: int
    """CPU threads of a shard: as many as here, so that products are summed in the same order."""
    memory: int
    """Bytes of memory that one shard takes."""

    @property
    def resources(self) -> dict[str, float]:
        """What one shard asks of a node, in Ray's names."""
        unit = {"GPU": 1} if self.device.startswith("cuda") else {"CPU": self.threads}
        return {**unit, "memory": self.memory}


class Progress:
    """An actor: tokens that each shard has done. One that is started again starts from nothing."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def begin(self, shard: int) -> None:
        self._done[shard] = 0

    def add(self, shard: int, tokens: int) -> None:
        self._done[shard] = self._done.get(shard, 0) + tokens

    def total(self) -> int:
        return sum(self._done.values())


def run_shard(
    job: Job, windows: Tensor, origin: Origin, shard: int, progress: Any
) -> tuple[None, Statistics]:
    """A task: one shard. The None says that it has ended, without its statistics being fetched."""
    torch.set_num_threads(job.threads)
    checkpoint = open_checkpoint(job.source)
    model = checkpoint.load(device=torch.device(job.device))
    progress.begin.remote(shard)

    def advance(tokens: int) -> None:
        progress.add.remote(shard, tokens)

    found = collect(model, windows, origin, checkpoint.sha256, needed=job.needed, advance=advance)
    return None, found


def check_installed() -> None:
    """Raises PruningError if Ray is not installed."""
    try:
        import ray  # noqa: F401
    except ImportError as e:
        raise PruningError(f"--ray needs an extra: {how_to_install('ray')}") from e


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connected to the cluster at `address`: host:port, `auto` for the one that this machine is in, or `local` to start
    one of this machine.

    Raises:
        PruningError: Ray is not installed, or there is no such cluster.
    """
    check_installed()
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, RuntimeError, ValueError) as e:
        raise PruningError(f"ray={address!r}: {e}") from e
    finally:
        # Ray sets one that ends the process with code 15, though in the main thread only.
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()


def room(job: Job) -> int:
    """How many shards the cluster can run at once.

    Raises:
        PruningError: not even one: it would wait for ever.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = sum(
        min(int(node.get(name, 0) // amount) for name, amount in job.resources.items()) for node in nodes
    )
    if not fits:
        wanted = ", ".join(f"{name} {amount:,}" for name, amount in job.resources.items())
        most = "; ".join(
            ", ".join(f"{name} {node.get(name, 0):,.0f}" for name in job.resources) for node in nodes
        )
        raise PruningError(f"no node of the Ray cluster has room for a shard ({wanted}); they have: {most}")
    return fits


def collect_on_ray(job: Job, windows: Tensor, origin: Origin, advance: Advance, at_once: int) -> Statistics:
    """`pruning.collection.collect` in shards (`take_shard`) on the cluster that this process is connected to.

    Shards are added up in their order, whichever ends first. The sums differ from those of one process by the rounding
    of float64 additions, and not at all from run to run. No more than `2 * at_once` shards are ahead of the sum.

    Raises:
        PruningError: a shard fails, or its process or machine went away more than `RETRIES` times.
    """
    import ray

    progress = ray.remote(Progress).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "OMP_NUM_THREADS": str(job.threads),
    }
    run = ray.remote(run_shard).options(
        num_cpus=job.resources.get("CPU", 0),
        num_gpus=job.resources.get("GPU", 0),
        memory=job.memory,
        num_returns=2,
        max_retries=RETRIES,
        runtime_env={"env_vars": environment},
    )
    running: dict[Any, tuple[int, Any]] = {}
    ended: dict[int, Any] = {}
    total: Statistics | None = None
    started, added, shown = 0, 0, 0
    try:
        while added < job.shards:
            while started < job.shards and started - added < 2 * at_once:
                started += 1
                part = take_shard(windows, origin, started, job.shards)
                end, statistics = run.remote(job, *part, started, progress)
                running[end] = started, statistics
            for end in ray.wait(list(running), timeout=POLL_S)[0] if running else ():
                shard, statistics = running.pop(end)
                _get(end, shard, job.shards)
                ended[shard] = statistics
            while added + 1 in ended:
                added += 1
                one = _get(ended.pop(added), added, job.shards)
                total = one if total is None else merge([total, one])
            now = ray.get(progress.total.remote())
            advance(now - shown)
            shown = now
    finally:
        for end in running:
            ray.cancel(end, force=True)
        ray.kill(progress)
    assert total is not None
    return total


def _get(reference: Any, shard: int, shards: int) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as e:
        what = str(e.cause) if isinstance(e.cause, PruningError) else f"{type(e.cause).__name__}: {e.cause}"
        raise PruningError(f"shard {shard}/{shards}: {what}") from e
    except ray.exceptions.RayError as e:
        raise PruningError(f"shard {shard}/{shards} went away, and again in {RETRIES} more tries: {e}") from e
