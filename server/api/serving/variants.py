"""The models that one server holds, dense and reduced, each behind its own engine process."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from server.api.serving.metrics import Metrics, VariantMetrics
from server.settings import Settings, VariantSettings, device_shares
from server.text.tokenizer import CheckpointText
from server.wire.client import EngineClient
from server.wire.messages import EngineConfig, Occupancy, Ready, one_or_all


class Variant:
    """One model: its name, its engine, and, once it has loaded, its shapes and tokenizer."""

    def __init__(self, name: str, source: str, client: EngineClient, metrics: VariantMetrics) -> None:
        self.name = name
        self.source = source
        self.client = client
        self.metrics = metrics
        self.created = int(time.time())
        self.admitted = 0
        """Requests that were let in and that the engine is not done with."""
        self.answers = 0
        """Answers that have not ended: of a stream, for as long as the client has not been sent all of it."""
        self.waiting = 0
        """Requests in the engine's queue, as it last said."""
        self._text: CheckpointText | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model has loaded once, so that its shapes and tokenizer are known."""
        return self.client.ready is not None

    @property
    def info(self) -> Ready:
        """What the engine said of itself. Only for a variant that has loaded."""
        if self.client.ready is None:
            raise RuntimeError(f"variant {self.name!r} has not loaded")
        return self.client.ready

    @property
    def text(self) -> CheckpointText:
        """The tokenizer and the chat template. Only for a variant that has loaded."""
        if self._text is None:
            raise RuntimeError(f"variant {self.name!r} has not loaded")
        return self._text

    @property
    def d_k(self) -> int | list[int]:
        """Key channels per head: one number when all layers agree."""
        return one_or_all(self.info.d_k)

    def load_text(self, checkpoint: Path) -> None:
        """Read the tokenizer, unless it is the one that is there, and the chat template."""
        self._text = CheckpointText(checkpoint, self.name, self._text)


def _make_runtime_dir() -> tuple[tempfile.TemporaryDirectory[str], IO[bytes]]:
    """A private directory for sockets and, in memory where the system has a place for that, log-probabilities that
    engines share; and the lock that says that it is in use. Those of servers that were killed are removed."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    for lock in parent.glob("lowkey-*/lock"):
        with contextlib.suppress(OSError), lock.open("rb") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while its server lives
            shutil.rmtree(lock.parent)
    directory = tempfile.TemporaryDirectory(prefix="lowkey-", dir=parent)
    unheld = Path(directory.name) / "unheld"
    held = unheld.open("wb")
    fcntl.flock(held, fcntl.LOCK_EX)
    unheld.rename(unheld.with_name("lock"))  # a server that starts now finds no lock that nobody holds
    return directory, held


class Variants:
    """All variants of a server, in the order of the configuration; the first is the default.

    Args:
        on_fatal: called with a variant's name and the reason when it can't be loaded at all (a bad checkpoint:
            restarting would not help).
    """

    def __init__(self, settings: Settings, metrics: Metrics, on_fatal: Callable[[str, str], None]) -> None:
        self._runtime_dir, self._lock = _make_runtime_dir()
        self._by_name: dict[str, Variant] = {}
        self.on_fatal = on_fatal
        for name, own in settings.variants.items():
            self._by_name[name] = self._make(name, own, settings, metrics.add_variant(name))

    @property
    def runtime_dir(self) -> Path:
        """Private to this server; gone when it closes."""
        return Path(self._runtime_dir.name)

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._by_name.values())

    def get(self, name: str) -> Variant | None:
        return self._by_name.get(name)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def start(self) -> None:
        for variant in self._by_name.values():
            variant.client.start()

    async def close(self) -> None:
        for variant in self._by_name.values():
            await variant.client.close()
        self._runtime_dir.cleanup()
        self._lock.close()

    def _make(self, name: str, own: VariantSettings, settings: Settings, metrics: VariantMetrics) -> Variant:
        config = EngineConfig(
            variant=name,
            source=own.source,
            device=own.device or settings.device,
            dtype=own.dtype or settings.dtype,
            max_requests=settings.max_requests,
            state_memory=settings.state_memory,
            device_memory=device_shares(settings)[name],
            devices=[other.device or settings.device for other in settings.variants.values()],
            state_dtype=settings.state_dtype,
            prefix_cache=settings.prefix_cache,
            batch_invariant=settings.batch_invariant,
            prefill_tokens=settings.prefill_tokens,
            threads=settings.threads,
            input_address="",
            output_address="",
            log_level=settings.log_level,
            log_format=settings.log_format,
        )

        def on_ready(ready: Ready) -> None:
            variant.load_text(Path(ready.checkpoint_path))
            metrics.on_ready(own.source, ready)

        def on_occupancy(occupancy: Occupancy) -> None:
            variant.waiting = occupancy.waiting
            metrics.on_occupancy(variant.info, occupancy)

        client = EngineClient(
            config,
            self.runtime_dir,
            hang_s=settings.hang_s,
            on_ready=on_ready,
            on_step=metrics.on_step,
            on_occupancy=on_occupancy,
            on_down=lambda: metrics.on_down(client.ready),
            on_fatal=lambda reason: self.on_fatal(name, reason),
        )
        variant = Variant(name, own.source, client, metrics)
        return variant
