"""Versions of the software that results depend on, for the files that tell how a result was made."""

import platform

import numpy as np
import safetensors
import tokenizers
import torch

from lowkey import __version__


def versions() -> dict[str, str]:
    """Versions of everything that a selection or a saved file depends on, by name."""
    return {
        "lowkey": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "tokenizers": tokenizers.__version__,
    }
