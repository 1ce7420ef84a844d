"""Runtimes: what computes a model for serving. `compile_model` chooses one when a model is loaded.

Each kind of machine has a folder or a file here, and in it each kind of layer has a file of its own. A runtime refuses
what it does not know; it never computes a model otherwise than `Model.forward` says.
"""

from modeling.runtime.choice import compile_model, prepare
from modeling.runtime.interface import Runtime, UnavailableError
from modeling.runtime.torch import TorchRuntime

__all__ = ["Runtime", "TorchRuntime", "UnavailableError", "compile_model", "prepare"]
