"""The engines of a server, one for each variant, and the queue in front of each."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from server.hub.metrics import EngineMetrics
from server.settings import Settings, device_shares
from server.wire.hub import EngineDown, EngineUp, Refusal, Update
from server.wire.messages import EngineConfig, Occupancy, Ready, Step
from server.wire.supervisor import Supervisor


class RuntimeDir:
    """A private directory for sockets and, in memory where the system has a place for that, log-probabilities that
    engines share; and the lock that says that it is in use. Those of servers that were killed are removed."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        for lock in parent.glob("lowkey-*/lock"):
            with contextlib.suppress(OSError), lock.open("rb") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its server lives
                shutil.rmtree(lock.parent)
        self._directory = tempfile.TemporaryDirectory(prefix="lowkey-", dir=parent)
        self.path = Path(self._directory.name)
        unheld = self.path / "unheld"
        self._lock: IO[bytes] = unheld.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unheld.rename(unheld.with_name("lock"))  # a server that starts now finds no lock that nobody holds

    def remove(self) -> None:
        """Remove the directory with all that is in it."""
        self._directory.cleanup()
        self._lock.close()


class Engine:
    """One variant's engine: its process, what it last said of itself, and who has places in its queue.

    Args:
        tell: tells all front ends something.
        on_report: called when the engine has said something of a step, and when it is gone.
        on_fatal: called with the reason when the model can't be loaded at all (a bad checkpoint: restarting would not
            help).
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: Settings,
        runtime_dir: Path,
        metrics: EngineMetrics,
        tell: Callable[[Update], None],
        on_report: Callable[[], None],
        on_fatal: Callable[[str], None],
    ) -> None:
        self.variant = config.variant
        self.waiting = 0
        """Requests in the engine's queue, as it last said."""
        self.admitted = 0
        """Requests that were let in and that the engine is not done with."""
        self.address = ""
        """Where the engine takes requests, while it is up."""
        self.last_step = 0.0
        """`made_at` of the last step that the engine has told of."""
        self._source = config.source
        self._max_queue = settings.max_queue
        self._metrics = metrics
        self._tell, self._on_report = tell, on_report
        self.process = Supervisor(
            config,
            runtime_dir,
            hang_s=settings.hang_s,
            on_ready=self._on_ready,
            on_step=self._on_step,
            on_occupancy=self._on_occupancy,
            on_down=self._on_down,
            on_restart=metrics.on_restart,
            on_fatal=on_fatal,
        )

    @property
    def ready(self) -> Ready | None:
        """What the engine said of itself when it last loaded; None until it first has."""
        return self.process.ready

    @property
    def up(self) -> bool:
        """Whether the engine takes requests now."""
        return self.process.up

    def refusal(self, places: int) -> Refusal | None:
        """Why so many requests can't be let in now; None if they can."""
        if self.ready is None or not self.up:
            now = "still loading" if self.ready is None else "down"
            return Refusal("engine_down", f"variant {self.variant!r} is {now}")
        room = self.ready.max_running + self._max_queue
        if places > room:
            return Refusal(
                "too_many",
                f"n: {places} choices in all are more than variant {self.variant!r} has room for, {room}",
            )
        if self.admitted + places > room:
            return Refusal(
                "queue_full", f"variant {self.variant!r} has {self.admitted} requests in its queue"
            )
        return None

    def _on_ready(self, ready: Ready, address: str) -> None:
        self.address = address
        self.last_step = time.monotonic()  # what is not known of the steps of engines before is lost
        self._tell(EngineUp(variant=self.variant, ready=ready, address=address))
        self._metrics.on_ready(self._source, ready)

    def _on_step(self, step: Step) -> None:
        self.last_step = step.made_at
        self._metrics.on_step(step)
        self._on_report()

    def _on_occupancy(self, occupancy: Occupancy) -> None:
        assert self.ready is not None
        self.waiting = occupancy.waiting
        self._metrics.on_occupancy(self.ready, occupancy)

    def _on_down(self) -> None:
        self.address, self.waiting = "", 0
        self._on_report()
        self._tell(EngineDown(variant=self.variant))
        self._metrics.on_down(self.ready)


def engine_configs(settings: Settings) -> list[EngineConfig]:
    """How the engine of each variant is started, in the order of the configuration."""
    shares = device_shares(settings)
    return [
        EngineConfig(
            variant=name,
            source=own.source,
            device=own.device or settings.device,
            dtype=own.dtype or settings.dtype,
            max_requests=settings.max_requests,
            state_memory=settings.state_memory,
            context_tokens=settings.context_tokens,
            device_memory=shares[name],
            devices=[other.device or settings.device for other in settings.variants.values()],
            state_dtype=own.state_dtype or settings.state_dtype,
            prefix_cache=settings.prefix_cache,
            batch_invariant=settings.batch_invariant,
            prefill_tokens=settings.prefill_tokens,
            threads=settings.threads,
            log_level=settings.log_level,
            log_format=settings.log_format,
        )
        for name, own in settings.variants.items()
    ]
