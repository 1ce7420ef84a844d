"""The file that `evaluate --json` writes and `report` reads."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from pruning.evaluation.bits import Bits
from pruning.evaluation.identifiers import IdentifierRecall
from pruning.evaluation.likelihood import Divergence, Perplexity
from pruning.evaluation.recall import Recall
from pruning.evaluation.speed import Speed
from pruning.evaluation.states import Rank, Retrieval
from pruning.json_record import read_record

KIND = "evaluation"
FORMAT = 1


@dataclass(frozen=True)
class EvaluatedCheckpoint:
    """What was measured of one checkpoint; None for what was not."""

    name: str
    sha256: str
    d_k: list[int]
    state_bytes: int
    """Bytes of one request's state in float32."""
    method: str | None
    """The method that reduced it; None for a dense one."""
    layers: list[int] | None = None
    """Indices of the linear-attention layers, which `d_k` and figures by layer are of; None for the first ones."""
    perplexity: Perplexity | None = None
    divergence: Divergence | None = None
    """How its predictions differ from the baseline's; None for the baseline itself."""
    recall: list[Recall] | None = None
    rank: Rank | None = None
    retrieval: Retrieval | None = None
    speed: list[Speed] | None = None
    bits: list[Bits] | None = None
    identifiers: list[IdentifierRecall] | None = None
    recovery_tokens: int | None = None
    """How many tokens `recover` trained it on; None for none, and in files of older versions."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of several checkpoints, the first being the baseline, and where."""

    kind: str
    format: int
    versions: dict[str, str]
    environment: dict[str, str | int]
    text: str
    text_sha256: str
    seed: int
    """Seed of the recall prompts and of the query noise."""
    checkpoints: list[EvaluatedCheckpoint]


def environment(device: torch.device) -> dict[str, str | int]:
    """The machine's properties that speeds depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def read_evaluation(path: Path) -> Evaluation:
    """Raises PruningError if the file is missing, of another format, or something else."""
    return read_record(path, Evaluation, KIND, FORMAT, "lowkey-prune evaluate --json")
