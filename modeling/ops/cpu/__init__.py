"""A whole model in C++, compiled for the machine it runs on."""

from modeling.ops.cpu.compiled import CompiledModel
from modeling.ops.cpu.rule import compiled_gated_delta_rule

__all__ = ["CompiledModel", "compiled_gated_delta_rule"]
