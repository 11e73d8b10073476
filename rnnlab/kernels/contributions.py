"""What the loss of one step does to the weights through the state of another: BPTT of every loss step apart.

Shapes as in `cpu.py`. The adjoint of one loss step never meets that of another: a group of them goes back together, as
so many more rows of a batch that share what `step` saved, and groups are dealt out to threads. At step k the rows b of
the batch, dL_t/da_b, meet what the weights were multiplied with, v_b = h_{k−1}, x_k or 1:

    C[t, k] = Σ_b dL_t/da_b · v_bᵀ                                        (Pascanu, Mikolov & Bengio 2013, eq. 3–5)

Of C only ‖C‖ and ⟨C, dL/dW⟩ are wanted. ‖C‖² knows v by its Gram matrix alone, Σ_{b,b'} (da_b·da_b')(v_b·v_b'), and the
triangular factor of that serves as well, and squares nothing: with v = F Qᵀ, Q (n, r) orthonormal and r = min(B, n), C
has the norm of Y = Σ_b dL_t/da_b F_bᵀ (G·H, r), and ⟨C, dL/dW⟩ = ⟨Y, dL/dW Q⟩. For no t and k a matrix is formed.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit

from ..cells import Cell
from . import Array, Floats, LayerTrace, LayerWeights, threads
from .calls import borrow
from .compiling import cached, part
from .panels import backward_panel, backward_reset, backward_step, moves, numbers_saved
from .products import list_tiles, multiply, pack_columns, panel_units, tile_at
from .simd import VECTOR_BYTES, address
from .team import empty

__all__ = ["contributions"]

#: Rows (loss steps times batch) that go back together: what they carry stays in the second-level cache.
_ROWS = 128

#: The exponent of a row of zeros, below all others.
_ZERO = -(2**30)


@cache
def _rescale(dtype):
    """Build the scaling of one row, of all its states, by a power of two to a largest entry in [1, 2)."""
    integer, bits = (np.int32, 32) if dtype.itemsize == 4 else (np.int64, 64)
    mantissa, bias, magnitude = np.finfo(dtype).nmant, np.finfo(dtype).maxexp - 1, integer(2 ** (bits - 1) - 1)

    @part(dtype)
    def rescale(carry, begin, stride, states, H):
        """Return the exponent that was taken out, or `_ZERO`."""
        largest, patterns = integer(0), carry.view(integer)
        for s in range(states):
            for j in range(H):  # magnitudes are ordered as their bits, of which a maximum fills vectors
                largest = max(largest, patterns[np.uintp(begin + s * stride + j)] & magnitude)
        if largest == 0:
            return _ZERO
        exponent = int(largest >> mantissa) - bias
        factor = math.ldexp(dtype.type(1), -exponent)
        for s in range(states):
            for j in range(H):
                carry[np.uintp(begin + s * stride + j)] *= factor
        return exponent

    return rescale


@njit
def _enter(carry, begin, stride, states, row, d_output):
    """Set the rows of one loss step that begin at `begin`: h to d_output (B, H), c and padding to zero."""
    B, H = d_output.shape
    for s in range(states):
        carry[s * stride + begin : s * stride + begin + B * row] = 0
    for b in range(B):
        carry[begin + b * row : begin + b * row + H] = d_output[b]


@njit(error_model="numpy", fastmath={"contract", "reassoc"})
def _sums(y, z, count):
    """Return Σ y² and Σ y·z of `count` numbers in float64. Their order is free, so that they fill vectors."""
    squares = product = 0.0
    for j in range(count):
        squares += np.float64(y[j]) * np.float64(y[j])
        product += np.float64(y[j]) * np.float64(z[j])
    return squares, product


@njit(error_model="numpy", fastmath={"contract"})
def _reduce(da, begin, wide, exponent, factors, slopes, parts, scale, y, norms, products):
    """Set ln ‖C‖ and ⟨C, dL/dW⟩ of one loss step and one k for all parts, from the rows of da that begin at `begin`."""
    B, top = len(exponent), exponent.max()
    for b in range(B):
        scale[b] = math.ldexp(1.0, max(exponent[b] - top, -2000))
    for p in range(len(parts) if top > _ZERO else 0):
        first, count, i0, i1 = parts[p]
        squares = product = 0.0
        for i in range(i0, i1):
            y[:count] = 0
            for b in range(i - i0, B):  # F is lower trapezoidal
                factor, at = factors[b, i] * scale[b], begin + b * wide + first
                for c in range(count):
                    y[np.uintp(c)] += factor * da[np.uintp(at + c)]
            sums = _sums(y, slopes[i], count)
            squares, product = squares + sums[0], product + sums[1]
        norms[p], products[p] = 0.5 * math.log(squares) + top * math.log(2.0), math.ldexp(product, top)


@cache
def _kernel(cell: Cell, dtype):
    G, S, P, K, KS = len(cell.gates), len(cell.states), len(cell.peepholes), cell.saved, numbers_saved(cell)
    V = VECTOR_BYTES // dtype.itemsize
    R, (THROUGH, SAVED, PEEPHOLE, DAX, DAH, DP, _, STATES) = backward_panel(cell, V)  # a tile's states lie behind it
    VECTORS, MANY, JOINT, RESET = R // V, panel_units(1), cell.joint, cell.reset is not None
    HEAD, WIDTH = G - bool(cell.reset), _width(cell)
    through_weights, rescale = multiply(1, dtype), _rescale(dtype)
    (load, store), (load_rows, store_rows) = moves(V, True), moves(V, False)
    (step_panel, _), reset_panel = backward_step(cell, V, True), backward_reset(cell, V) if RESET else None

    @cached(f"{cell.name}-{dtype}", cell.step_backward, *(cell.reset or ()))
    def contributions(arguments):
        """Fill norms and products (loss steps, T, parts) of the loss steps `at`, the last one first."""
        (
            at, d_output, saved, weight_hh, peephole, factors, slopes, parts, packed, packed_last, carry, d_reset, da,
            y, scale, panel, exponent, tiles, norms, products,
        ) = borrow(arguments)  # fmt: skip
        (_, B, H), units, flat_saved = d_output.shape, saved.shape[1], saved.reshape(-1)
        row, wide, stride, dah = units * V, WIDTH * H, len(carry) // S, 0 if JOINT else G * H
        of_carry, of_saved, of_da = (stride, row, V), (V, KS * V, B * KS * V), (H, wide, V)
        pack_columns(packed, 0, weight_hh[: HEAD * H], 1, 1, MANY, 0, units)
        if RESET:
            pack_columns(packed_last, 0, weight_hh[HEAD * H :], 1, 1, MANY, 0, units)
        count, most = list_tiles(tiles, 0, B, 0, units, units, MANY, VECTORS, V), stride // (B * row)
        for first in range(0, len(at), most):
            last, active = min(first + most, len(at)), 0
            for k in range(at[first], -1, -1):
                while first + active < last and at[first + active] == k:
                    exponent[active * B : (active + 1) * B] = 0
                    _enter(carry, active * B * row, stride, S, row, d_output[k])
                    active += 1
                for r in range(active * B):
                    e = rescale(carry, r * row, stride, S, H)
                    exponent[r] = e if e == _ZERO else exponent[r] + e
                kept, rows = k * units * B * KS * V, active * B
                for n in range(active * count):
                    tile, here, there = tile_at(tiles, n % count), n // count * B * row, n // count * B * wide
                    load(panel, STATES, R, carry, here, S, of_carry, tile, H)
                    load(panel, SAVED, R, flat_saved, kept, K, of_saved, tile, H)
                    load_rows(panel, PEEPHOLE, R, peephole, 0, P, (H, 0, V), tile, H)
                    step_panel(panel, panel[STATES:], tile[1] * tile[3] * V)
                    store_rows(panel, DAX, R, da, there, G, of_da, tile, H)
                    if not JOINT:
                        store_rows(panel, DAH, R, da, there + dah, G, of_da, tile, H)
                    store_rows(panel, DP, R, da, there + wide - P * H, P, of_da, tile, H)
                    store(panel, STATES, R, carry, here, S, of_carry, tile, H)
                if RESET:
                    d_reset[:] = 0
                    there = address(d_reset, 0)
                    through_weights(
                        there, row, there, row, address(da, HEAD * H), wide, address(packed_last, 0), H, rows, 0, units,
                        units,
                    )  # fmt: skip
                    for n in range(active * count):
                        tile, here = tile_at(tiles, n % count), n // count * B * row
                        load(panel, THROUGH, R, d_reset, here, 1, of_carry, tile, H)
                        load(panel, SAVED, R, flat_saved, kept + K * V, 2, of_saved, tile, H)
                        load(panel, STATES, R, carry, here, 1, of_carry, tile, H)
                        reset_panel(panel, panel[STATES:], tile[1] * tile[3] * V)
                        store_rows(panel, DAX, R, da, n // count * B * wide, 1, of_da, tile, H)
                        store(panel, STATES, R, carry, here, 1, of_carry, tile, H)
                for n in range(active):
                    _reduce(
                        da, n * B * wide, wide, exponent[n * B : (n + 1) * B], factors[k], slopes[k], parts, scale, y,
                        norms[first + n, k], products[first + n, k],
                    )  # fmt: skip
                here = address(carry, 0)
                through_weights(
                    here, row, here, row, address(da, dah), wide, address(packed, 0), HEAD * H, rows, 0, units, units
                )

    return contributions


def _width(cell: Cell) -> int:
    """Return how many times H numbers a row of da has: dL/dax, dL/dah where that is another, dL/dpeephole."""
    return (1 if cell.joint else 2) * len(cell.gates) + len(cell.peepholes)


def _room(cell: Cell, B: int, H: int, most: int, dtype: np.dtype[Any]) -> tuple[Array, ...]:
    """Return where one thread works: what `contributions` of `_kernel` takes between parts and norms."""
    V, G, reset = VECTOR_BYTES // dtype.itemsize, len(cell.gates), int(cell.reset is not None)
    row, rows = -(-H // V) * V, most * B
    carried = (G - reset) * H * row, reset * H * row, len(cell.states) * rows * row, reset * rows * row
    sizes = (
        *carried,
        rows * _width(cell) * H,
        G * H,
        B,
        backward_panel(cell, V)[1][-1] + len(cell.states) * backward_panel(cell, V)[0],
    )
    *work, panel = (empty((size,), dtype) for size in sizes)
    panel[:] = 0  # lanes past H, which nobody reads, should at least not trap in denormals
    return (*work, panel, np.zeros(rows, np.int64), np.empty((row // V * B, 5), np.int64))


def contributions(
    cell: Cell, trace: LayerTrace, weights: LayerWeights, d_output: Array, gradient: LayerWeights
) -> dict[str, tuple[Floats, Floats]]:
    """Return by the name of each weight ln ‖C[t, k]‖ and ⟨C[t, k], gradient⟩, (T, T) both.

    d_output (T, B, H) is the derivative of L_t by the output of step t; `gradient` has the shapes of the weights. Where
    there is no loss at t, and for k > t, the two are −inf and 0.
    """
    (T, B, H), G, dtype = d_output.shape, len(cell.gates), d_output.dtype
    head, dah, one = (G - bool(cell.reset)) * H, 0 if cell.joint else G * H, np.ones((T, B, 1), dtype)
    first_peephole = (_width(cell) - len(cell.peepholes)) * H
    pairs = [
        ("weight_ih", 0, gradient.weight_ih, trace.x),
        ("weight_hh", dah, gradient.weight_hh[:head], trace.state[0, :-1]),
        ("weight_hh", dah + head, gradient.weight_hh[head:], trace.reset_h),
        ("bias_ih", 0, gradient.bias_ih[:, None], one),
        ("bias_hh", dah, gradient.bias_hh[:, None], one),
        ("peephole", first_peephole, gradient.peephole[:, None], one),
    ]
    pairs = [pair for pair in pairs if len(pair[2])]
    split = [np.linalg.qr(values.swapaxes(1, 2)) for *_, values in pairs]
    ranks = np.cumsum([0, *(triangle.shape[1] for _, triangle in split)])
    parts = np.array([(pair[1], len(pair[2]), *ends) for pair, ends in zip(pairs, pairwise(ranks), strict=True)])
    factors, slopes = np.empty((T, B, ranks[-1]), dtype), np.empty((T, ranks[-1], G * H), dtype)
    for (_, _, matrix, _), (q, triangle), (_, rows, *ends) in zip(pairs, split, parts, strict=True):
        factors[:, :, slice(*ends)] = triangle.swapaxes(1, 2)
        slopes[:, slice(*ends), :rows] = q.swapaxes(1, 2) @ matrix.T

    saved = np.ascontiguousarray(trace.saved_of(0, T))
    steps, parties = np.flatnonzero(d_output.any(axis=(1, 2)))[::-1], threads()
    most = max(1, min(_ROWS // B, -(-len(steps) // parties)))
    calls = []
    for rank in range(parties):
        at = steps[np.arange(len(steps)) // most % parties == rank].copy()
        shape = len(at), T, len(parts)
        given = at, d_output, saved, weights.weight_hh, weights.peephole, factors, slopes, parts
        calls.append((*given, *_room(cell, B, H, most, dtype), np.full(shape, -np.inf), np.zeros(shape)))
    with ThreadPoolExecutor(parties) as pool:
        list(pool.map(_kernel(cell, dtype), calls))
    norms, products = np.full((len(parts), T, T), -np.inf), np.zeros((len(parts), T, T))
    for at, *_, some_norms, some_products in calls:
        norms[:, at], products[:, at] = some_norms.transpose(2, 0, 1), some_products.transpose(2, 0, 1)
    found: dict[str, tuple[Floats, Floats]] = {}
    for (name, *_), norm, product in zip(pairs, norms, products, strict=True):
        before = found.get(name, (np.full((T, T), -np.inf), np.zeros((T, T))))
        found[name] = 0.5 * np.logaddexp(2 * before[0], 2 * norm), before[1] + product
    return found
