"""Where the Triton kernels will live, imported as ``fastcl.kernels``; none is written yet."""
