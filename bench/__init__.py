"""Benchmarks: fastcl against plain PyTorch, torch.compile and the packages on PyPI."""
