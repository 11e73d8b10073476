"""exp, tanh and sigmoid as branch-free scalar arithmetic, each with its slope, exact in the tails.

Every function takes and returns one float32 or float64 and computes in that type alone. There are no branches, no
tables and no calls into a maths library, so LLVM turns a loop over any of them into vector code, and the same functions
compile for a GPU. Values and slopes keep a relative accuracy of a few ulp over the whole range of the type: sigmoid(x)
for x → −∞ and the slope of a saturated unit fade out through the subnormal numbers instead of dropping to zero.

An activation returns `(value, slope)`. The slope comes out of the same exponential at full accuracy, where 1 − tanh²
or s·(1 − s), computed from a rounded value, would have cancelled.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

__all__ = ["ARITHMETIC", "exp", "relu", "scalar", "sigmoid", "tanh"]

#: Options of all compiled arithmetic. Fusing a multiply with an add ("contract") only ever drops a rounding.
ARITHMETIC: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

#: The one decorator of scalar functions.
scalar: Callable[[Any], Any] = njit(forceinline=True, **ARITHMETIC)


def _split_exp(real, integer, mantissa_bits, bias, lift, low, high, ln2_high, ln2_low, expm1):
    """Build (a, sign) ↦ (p, s, tiny) with exp(sign·a) = (1 + p)·s·tiny, a ≥ 0 (Cody & Waite 1980, ch. 6).

    `expm1` approximates exp(r) − 1 for |r| ≤ ln2 / 2. s is a power of two; `tiny` is 2^−lift for a negative sign and
    2^lift for a positive one: s alone is a normal number where exp is subnormal or overflows.
    """
    low, high = real(low), real(high)
    log2_e, ln2_high, ln2_low = real(1 / np.log(2.0)), real(ln2_high), real(ln2_low)
    # Adding 1.5·2^mantissa_bits rounds to a whole number and leaves that number in the low bits, here added to what the
    # exponent of s begins with.
    falling, rising = (real(1.5 * 2.0**mantissa_bits + bias + k) for k in (lift, -lift))
    up, down, mantissa_bits, zero = real(2.0**lift), real(2.0**-lift), integer(mantissa_bits), real(0)

    @scalar
    def split(a, sign):
        limit = high if sign > zero else low
        a = limit if a > limit else a
        magic = rising if sign > zero else falling
        shifted = magic - a * (-sign * log2_e)  # a sum would become a comparison and a selection of −a, not a minimum
        whole = shifted - magic
        r = (sign * a - whole * ln2_high) - whole * ln2_low
        s = integer(real(shifted).view(integer) << mantissa_bits).view(real)
        return expm1(r), s, up if sign > zero else down

    return split


# exp(r) − 1 = r + r²·q(r), q interpolated at Chebyshev nodes of |r| ≤ ln2 / 2: relative error under 6e-10 and 6e-19.
# Sums of pairs, of pairs of pairs … (Estrin 1960) wait less for one another than Horner's rule.
def _expm1_polynomial32():
    c = tuple(
        np.float32(number)
        for number in (
            0.50000000134981778643,
            0.16666666681659179129,
            0.041666464602026541557,
            0.0083333108895820771937,
            0.0013933685862617173589,
            0.00019891030654370327738,
        )
    )

    @scalar
    def expm1(r):
        r2 = r * r
        return r + r2 * ((c[0] + r * c[1]) + r2 * ((c[2] + r * c[3]) + r2 * (c[4] + r * c[5])))

    return expm1


@scalar
def _expm1_polynomial64(r):
    r2 = r * r
    r4 = r2 * r2
    low = (0.5 + r * 0.16666666666666671008) + r2 * (0.041666666666666669767 + r * 0.0083333333333261120526)
    middle = 0.0013888888888883731828 + r * 0.00019841269874901259234
    middle += r2 * (0.000024801587325605322782 + r * 2.7557255297969644392e-6)
    high = (2.7557273570102139673e-7 + r * 2.5105259538448493419e-8) + r2 * 2.0914717341716375952e-9
    return r + r2 * (low + r4 * (middle + r4 * high))


_split_exp32 = _split_exp(
    np.float32, np.int32, 23, 127, 40, 110, 90, 0.693145751953125, 1.4286068203094172321e-6, _expm1_polynomial32()
)
_split_exp64 = _split_exp(
    np.float64, np.int64, 52, 1023, 200, 760, 720, 0.6931471803691238, 1.9082149292705878161e-10, _expm1_polynomial64
)


def _exp_parts(a, sign):
    """Stand for `_split_exp32` or `_split_exp64`, whichever the type of `a` asks for, in compiled code."""


@overload(_exp_parts)
def _choose_exp_parts(a, sign):
    chosen = {types.float32: _split_exp32, types.float64: _split_exp64}.get(a)
    return None if chosen is None else lambda a, sign: chosen(a, sign)


def _is_negative(x):
    """Stand for the sign bit of x: a comparison with 0 takes LLVM an operation more."""


@overload(_is_negative)
def _choose_is_negative(x):
    kinds: Any = {types.float32: (np.float32, np.int32), types.float64: (np.float64, np.int64)}.get(x)
    if kinds is None:
        return None
    real, integer = kinds
    return lambda x: real(x).view(integer) < integer(0)


@scalar
def exp(x):
    """Return eˣ."""
    p, s, tiny = _exp_parts(abs(x), type(x)(1) if x > type(x)(0) else type(x)(-1))
    return (p * s + s) * tiny


@scalar
def sigmoid(x):
    """Return σ(x) = 1 / (1 + e⁻ˣ) and its slope σ'(x) = σ(x)·σ(−x)."""
    one = type(x)(1)
    p, s, tiny = _exp_parts(abs(x), -one)
    e, unit = p * s + s, one / tiny  # e^−|x| and 1, both times 2^lift
    less, more = e / (unit + e), unit / (unit + e)
    return (less if _is_negative(x) else more), less * more


@scalar
def tanh(x):
    """Return tanh(x) and its slope 1 / cosh²(x)."""
    one = type(x)(1)
    p, s, tiny = _exp_parts(abs(x + x), -one)
    unit = one / tiny
    e, expm1 = p * s + s, s * p + (s - unit)  # e^−2|x| and that less 1, both times 2^lift
    total = unit + unit + expm1
    return math.copysign(expm1, x) / total, (e + e) / total * ((unit + unit) / total)


@scalar
def relu(x):
    """Return max(x, 0) and its slope, 0 at x = 0; NaN stays NaN."""
    zero, one = type(x)(0), type(x)(1)
    return (zero if x <= zero else x), (zero if x <= zero else one)
