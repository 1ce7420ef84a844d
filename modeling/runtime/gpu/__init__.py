"""Serving on NVIDIA GPUs. Nothing is imported here: Triton and fla are there only where the `gpu` extra is
installed."""
