"""Numba-accelerated recurrent networks whose gradients can be measured exactly."""
