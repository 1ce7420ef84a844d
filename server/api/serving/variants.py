"""The models that one server holds, dense and reduced, each behind an engine process of its own."""

from collections.abc import Iterator
from pathlib import Path

from server.api.serving.metrics import Metrics, VariantMetrics
from server.settings import Settings
from server.text.tokenizer import CheckpointText, TextOptions
from server.wire.client import EngineClient
from server.wire.hub import Link
from server.wire.messages import Ready, one_or_all


class Variant:
    """One model: its name, its engine, and, once it has loaded, its shapes and tokenizer."""

    def __init__(
        self,
        name: str,
        source: str,
        client: EngineClient,
        metrics: VariantMetrics,
        link: Link,
        options: TextOptions,
    ) -> None:
        self.name = name
        self.source = source
        self.client = client
        self.metrics = metrics
        self.created = link.started
        self._options = options
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

    def engine_up(self, ready: Ready, address: str) -> None:
        """The engine has loaded, and takes requests there."""
        self.load_text(Path(ready.checkpoint_path))
        self.client.engine_up(ready, address)

    def load_text(self, checkpoint: Path) -> None:
        """Read the tokenizer, unless it is the one that is there, and the chat template."""
        self._text = CheckpointText(checkpoint, self.name, self._text, self._options)


class Variants:
    """All variants of a server, in the order of the configuration; the first is the default."""

    def __init__(self, settings: Settings, metrics: Metrics, link: Link) -> None:
        self._by_name = {
            name: Variant(
                name,
                own.source,
                EngineClient(name, link.front_end),
                metrics.add_variant(name),
                link,
                TextOptions(
                    own.tool_call_parser or settings.tool_call_parser,
                    own.reasoning_parser or settings.reasoning_parser,
                    own.generation_config or settings.generation_config,
                ),
            )
            for name, own in settings.variants.items()
        }

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> Variant:
        return self._by_name[name]

    def get(self, name: str) -> Variant | None:
        return self._by_name.get(name)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def close(self) -> None:
        """Have no more to do with the engines. Requests in them fail."""
        for variant in self._by_name.values():
            variant.client.engine_down()
