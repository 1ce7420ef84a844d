"""The decode step of a whole model in one call of C++, compiled for the machine it runs on."""

from modeling.ops.cpu.decoder import Decoder

__all__ = ["Decoder"]
