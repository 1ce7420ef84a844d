"""Triton kernels; each kind of layer has a file of its own, and so have their launches, one folder up."""
