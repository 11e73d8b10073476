"""What several test modules share: relative errors, random networks and their textbook parameters, slow derivatives."""

import contextlib
import platform
import re

import hypothesis
import naive
import numpy as np
import pytest

from rnnlab import Recurrent
from rnnlab.kernels.plan import Chip, plan
from rnnlab.kernels.simd import VECTOR_BYTES

hypothesis.settings.register_profile("rnnlab", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("rnnlab")

#: float64 against another way to the same numbers: an entry sums at most some 1,500 products, each rounded to 1.1e-16,
#: which is 1.7e-13 if all err one way, and the terms of a sum may be a few times larger than the sum. Found: 3e-15.
TOLERANCE = 1e-12

#: A cell of each kind: one product; ax and ah apart; two products. The others differ from them by `step` alone.
KINDS = ("lstm_peephole", "gru", "gru_reset_before")

#: Of `directional_difference`, for a function around 1; in proportion for one that is a sum of many such terms.
DIFFERENCE_TOLERANCE = 1e-11


def relative_error(got, want):
    """max|got − want| / max|want|, and max|got| where `want` is all zero."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    scale = np.abs(want).max(initial=0.0)
    return np.abs(got - want).max(initial=0.0) / (scale if scale > 0 else 1.0)


def random_network(
    cell,
    input_size,
    hidden_size,
    num_layers=1,
    *,
    bidirectional=False,
    bias=True,
    dropout=0.0,
    dtype="float64",
    device="cpu",
    scale=0.5,
    seed=0,
):
    """A network with every parameter from N(0, scale²), and the same numbers as the textbook takes them."""
    net = Recurrent(
        cell,
        input_size,
        hidden_size,
        num_layers,
        bias=bias,
        bidirectional=bidirectional,
        dropout=dropout,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    drawn = naive.init_params(cell, input_size, hidden_size, num_layers, bidirectional, bias, rng, scale)
    assert list(drawn) == list(net.params)
    for name, values in drawn.items():
        net.params[name] = values.astype(net.dtype)
    return net, {name: values.astype(np.float64) for name, values in net.params.items()}


def random_state(rng, net, batch, scale=1.0):
    """An initial state, or a gradient of the final one, in the form of `Trace.final`."""
    shape = (net.num_layers * net.directions, batch, net.hidden_size)
    return as_state(rng.normal(0, scale, shape).astype(net.dtype) for _ in net.cell.states)


def as_state(parts):
    """The form of `Trace.final`: h, or (h, c), given the arrays."""
    parts = tuple(parts)
    return parts if len(parts) > 1 else parts[0]


def parts_of(state):
    """The arrays of a state: the inverse of `as_state`."""
    return state if isinstance(state, tuple) else (state,)


def random_direction(rng, array):
    """A direction of length 1 in the space of `array`."""
    direction = rng.normal(size=array.shape)
    return direction / np.linalg.norm(direction)


def directional_difference(function, array, direction, step=1e-4):
    """d/ds function() as `array` moves along `direction`, a vector of length 1; `array` is restored.

    The central difference over four points is off by step⁴/30 = 3e-18 times the fifth derivative and by rounding,
    1e-16 / step = 1e-12 times the terms of which the function is a sum: 3e-12 is found where that is around 1.
    """
    start = array.copy()

    def difference(distance):
        array[...] = start + distance * direction
        above = function()
        array[...] = start - distance * direction
        below = function()
        array[...] = start
        return above - below

    return (8 * difference(step) - difference(2 * step)) / (12 * step)


def packed_single(assembly, half=False):
    """The instructions that add, multiply or compare float32 numbers in whole vector registers of the host.

    With `half`, of 64-byte registers also in halves: LLVM prefers those on some hosts where it is left the choice.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"reads x86 assembly, this is {platform.machine()}")
    registers = {64: "[yz]" if half else "z", 32: "y", 16: "x"}[VECTOR_BYTES]
    return re.findall(rf"\bv?(?:add|mul|max|cmp\w*|fn?m(?:add|sub)\d+)ps\b.*%{registers}mm", assembly)


def double_arithmetic(llvm):
    """The lines of LLVM IR that compute in float64 or convert between it and float32.

    Sizes of arrays, which Numba compares and counts the digits of (for an error message) in float64, are none of them.
    """
    return re.findall(r".*\b(?:f(?:add|sub|mul|div|rem|neg|ptrunc|pext)|fma\.f64)\b.*\bdouble\b.*", llvm)


def full_chip(*problem, **options):
    """A GPU that has no register for a weight of this plan, and shared memory for some of them if not for all."""
    for shared in np.geomspace(64, 232_448, 400):
        chip = Chip((9, 0), 4, int(shared), 0)
        with contextlib.suppress(ValueError):
            made = plan(*problem, chip=chip, **options)
            if any(product.kept for product in made.products) or all(product.chunks == 1 for product in made.products):
                return chip
    raise AssertionError(f"{problem} fits none")
