"""The native CPU backend: what the C++ kernels compute, between the ops and the extension."""
