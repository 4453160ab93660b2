"""Triton kernels, imported as ``fastcl.kernels``."""
