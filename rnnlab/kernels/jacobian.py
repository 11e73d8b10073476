"""Jacobians of single steps: `step_backward` with unit cotangents, and products with W_hh. Shapes: see `cpu`."""

from functools import cache
from typing import NamedTuple

import numpy as np

from ..cells import Cell
from . import Array, LayerTrace, LayerWeights
from .compiling import cached
from .panels import put_numbers, take_numbers

__all__ = ["Diagonals", "diagonals", "diagonals_kernel", "jacobian"]


class Diagonals(NamedTuple):
    """What the Jacobians of N single steps are made of, besides weights: derivatives of the new states, unit by unit.

    ax, ah (S, N, G, H): of new state s by the pre-activations; old (S, S, N, H): of new state s by old state q, where
    it does not pass through W_hh; reset (2, N, H): of a cell that resets before the product r and ∂(r ∘ h)/∂a_r.
    """

    ax: Array
    ah: Array
    old: Array
    reset: Array


@cache
def diagonals_kernel(cell: Cell, dtype):
    """Unit cotangents through `step_backward`: the diagonals of which the Jacobian is made."""
    G, S, P, K = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved
    step_backward = cell.step_backward
    take_saved, take_peepholes, take_states = map(take_numbers, (K, P, S))
    put_gates, put_states = map(put_numbers, (G, S))

    @cached(f"{cell.name}-{dtype}", step_backward)
    def diagonals(saved, peephole, unit, d_ax, d_ah, d_old):
        """Fill d_ax, d_ah (S, B, G·H), d_old (S, S, B, H): row s is the cotangent of new state s; unit the identity."""
        B, H = d_old.shape[2:]
        row = np.empty(max(G, S), saved.dtype)
        for s in range(S):
            for b in range(B):
                for j in range(H):
                    da_x, da_h, _, _, old = step_backward(
                        take_saved(saved[b], j, H), take_peepholes(peephole, j, H), take_states(unit[s], 0, 1)
                    )
                    put_gates(d_ax[s, b], j, H, da_x)
                    put_gates(d_ah[s, b], j, H, da_h)
                    put_states(row, 0, 1, old)
                    for q in range(S):
                        d_old[s, q, b, j] = row[q]

    return diagonals


def diagonals(cell: Cell, trace: LayerTrace, weights: LayerWeights, start: int, stop: int) -> Diagonals:
    """Return the diagonals of steps start…stop − 1 of every sequence, in that order: N = (stop − start)·B."""
    (units, _, _, V), B, dtype = trace.saved.shape[2:], len(trace.lengths), trace.saved.dtype
    H, S, G, N = weights.weight_hh.shape[1], len(cell.states), len(cell.gates), (stop - start) * B
    saved = trace.saved_of(start, stop).transpose(0, 2, 3, 1, 4).reshape(N, -1, units * V)[:, :, :H]
    numbers = np.ascontiguousarray(saved).reshape(N, -1)
    d_ax, d_ah, d_old = (np.empty((S, *shape), dtype) for shape in ((N, G * H), (N, G * H), (S, N, H)))
    diagonals_kernel(cell, dtype)(numbers, weights.peephole, np.eye(S, dtype=dtype), d_ax, d_ah, d_old)
    gates = S, N, G, H
    return Diagonals(d_ax.reshape(gates), d_ah.reshape(gates), d_old, saved[:, cell.saved :].swapaxes(0, 1))


def jacobian(cell: Cell, trace: LayerTrace, weights: LayerWeights, t: int) -> Array:
    """Return d state_{t+1} / d state_t of every sequence, (B, S·H, S·H), the states stacked as [h; c].

    J = D_direct + Σ_g diag(D_g)·W_hh,g, the diagonals from `step_backward` with unit cotangents.
    """
    H, S, G, B = weights.weight_hh.shape[1], len(cell.states), len(cell.gates), trace.x.shape[1]
    parts = diagonals(cell, trace, weights, t, t + 1)
    products = np.broadcast_to(weights.weight_hh.reshape(G, H, H), (B, G, H, H))
    if cell.reset:
        r, reset_r = parts.reset
        d_reset = reset_r[:, :, None] * products[:, 0] + r[:, :, None] * np.eye(H, dtype=r.dtype)
        products = np.stack([*products.swapaxes(0, 1)[:-1], products[:, -1] @ d_reset], axis=1)
    J = np.zeros((B, S, H, S, H), trace.x.dtype)
    J[:, :, :, 0] = np.einsum("sbgj,bgjk->bsjk", parts.ah, products)
    unit = np.arange(H)
    J[:, :, unit, :, unit] += parts.old.transpose(3, 2, 0, 1)
    J[t >= trace.lengths] = np.eye(S * H, dtype=J.dtype).reshape(S, H, S, H)
    return J.reshape(B, S * H, S * H)
