"""A model in C++, compiled for the machine it runs on; each kind of layer has a header and its mirror in Python."""

from modeling.runtime.cpu.rule import compiled_gated_delta_rule
from modeling.runtime.cpu.runtime import CpuRuntime

__all__ = ["CpuRuntime", "compiled_gated_delta_rule"]
