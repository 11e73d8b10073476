"""Sequence kernels, one file per backend."""
