"""exp, sigmoid, tanh and relu: values and slopes over the whole range, in the type of the argument, as vector code."""

import mpmath
import naive
import numpy as np
import pytest
from conftest import double_arithmetic, packed_single
from numba import njit, types

from rnnlab import activations


@njit
def _exp(x):
    return activations.exp(x), type(x)(0)


def _over_arrays(function):
    """A compiled loop (x, values, slopes) over a scalar function that returns (value, slope)."""

    @njit
    def loop(x, values, slopes):
        for i in range(x.size):
            values[i], slopes[i] = function(x[i])

    return loop


FUNCTIONS = {"exp": _exp, "sigmoid": activations.sigmoid, "tanh": activations.tanh, "relu": activations.relu}
LOOPS = {name: _over_arrays(function) for name, function in FUNCTIONS.items()}

#: The exact value and slope of an mpmath number; exp has one number only.
EXACT = {
    "exp": (mpmath.exp,),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), lambda x: 1 / ((1 + mpmath.exp(-x)) * (1 + mpmath.exp(x)))),
    "tanh": (mpmath.tanh, lambda x: mpmath.sech(x) ** 2),
}

#: Largest error in ulp of value and slope. Each rounding on the way adds up to ½ ulp of an intermediate result: 6 ulp
#: for the value and 10 for the slope of sigmoid if all went one way. The worst of 80,000 points in each type were 0.94
#: for exp, 2.4 and 4.3 for sigmoid, 3.0 and 5.2 for tanh, with fused multiply-add and without.
ULPS = {"exp": (1.0,), "sigmoid": (3.0, 5.0), "tanh": (3.5, 6.0)}

#: Arguments beyond which exp under- or overflows, its subnormal results included.
RANGE = {"float32": (-105, 89), "float64": (-746, 710)}


def evaluate(name, x):
    values, slopes = np.empty_like(x), np.empty_like(x)
    LOOPS[name](x, values, slopes)
    return values, slopes


def points(dtype, n=500):
    """Arguments over the whole range, around zero, and down to the smallest numbers of the type."""
    rng = np.random.default_rng(0)
    tiny = np.exp(rng.uniform(np.log(np.finfo(dtype).smallest_subnormal), 0, n)) * rng.choice([-1, 1], n)
    low, high = RANGE[dtype]
    uniform = [rng.uniform(low, high, n), rng.uniform(-20, 20, n), rng.uniform(-2, 2, n)]
    return np.concatenate([[0.0], *uniform, tiny]).astype(dtype)


def ulp_error(got, x, exact):
    """The largest |got − exact(x)| in units of the last place of the exact number, subnormal ones included."""
    with mpmath.workdps(50):
        want = [exact(mpmath.mpf(float(v))) for v in x]
        rounded = np.array([float(w) for w in want])
        with np.errstate(over="ignore", under="ignore"):
            rounded = rounded.astype(got.dtype)
        infinite = np.isinf(rounded)
        np.testing.assert_array_equal(got[infinite], rounded[infinite])
        assert np.isfinite(got[~infinite]).all()  # NaN compares with nothing
        pairs = [(g, w, u) for g, w, u in zip(got, want, np.spacing(np.abs(rounded)), strict=True) if np.isfinite(u)]
        return float(max(abs(mpmath.mpf(float(g)) - w) / mpmath.mpf(float(u)) for g, w, u in pairs))


@pytest.mark.parametrize("dtype", RANGE)
@pytest.mark.parametrize("name", EXACT)
def test_error_is_a_few_ulp_over_the_whole_range(name, dtype):
    x = points(dtype)
    for got, exact, ulps in zip(evaluate(name, x), EXACT[name], ULPS[name], strict=False):
        assert ulp_error(got, x, exact) <= ulps


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_float32_in_every_binade(name):
    """A million bit patterns, subnormal and huge ones too, against float64, whose error is 2⁻²⁹ of a float32 ulp."""
    x = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    value, slope = {"sigmoid": (naive.sigmoid, naive.sigmoid_prime), "tanh": (np.tanh, naive.tanh_prime)}[name]
    for got, reference, ulps in zip(evaluate(name, x), (value, slope), ULPS[name], strict=True):
        with np.errstate(under="ignore"):
            want = reference(x.astype(np.float64))
            unit = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
        assert (np.abs(got - want) / unit).max() <= ulps


def test_sigmoid_keeps_its_tail():
    tail = 3.720075976020836e-44  # e^−100 / (1 + e^−100), to all digits of float64
    for got in evaluate("sigmoid", np.array([-100.0])):
        np.testing.assert_allclose(got, [tail], rtol=3 * np.finfo(float).eps)  # ULPS of the value
    assert evaluate("sigmoid", np.array([-745.0]))[0][0] == 5e-324  # e^−745 = 5.01e-324, the smallest number there is


def test_float32_sigmoid_is_accurate_down_to_the_smallest_normal_number():
    x = np.linspace(np.log(np.finfo(np.float32).tiny) + 1e-4, -60, 10_000).astype(np.float32)
    for got in evaluate("sigmoid", x):
        assert got.min() < 1.2e-38
        assert np.abs(got / np.exp(x.astype(np.float64)) - 1).max() <= 5 * np.finfo(np.float32).eps  # ULPS of the slope


def test_slope_of_a_saturated_tanh_does_not_cancel():
    """1 − tanh²(x) would be 0 from |x| = 9 on in float32; the slope is 4e^(−2|x|) down to the subnormal numbers."""
    x = np.array([-51, -40, -20, -10, 10, 20, 40, 51], np.float32)
    _, slope = evaluate("tanh", x)
    exact = 4 * np.exp(-2 * np.abs(x.astype(np.float64)))
    assert (np.abs(slope - exact) <= 6 * np.spacing(exact.astype(np.float32))).all()  # ULPS; 1e-9 from the formula
    assert (slope > 0).all()


@pytest.mark.parametrize("dtype", RANGE)
@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("exp", (0, np.inf, np.nan), (0, 0, 0)),
        ("sigmoid", (0, 1, np.nan), (0, 0, np.nan)),
        ("tanh", (-1, 1, np.nan), (0, 0, np.nan)),
    ],
)
def test_infinities_and_nan(name, value, slope, dtype):
    got = evaluate(name, np.array([-np.inf, np.inf, np.nan], dtype))
    np.testing.assert_array_equal(got, np.array([value, slope], dtype))


@pytest.mark.parametrize("dtype", RANGE)
def test_tanh_keeps_the_sign_of_zero(dtype):
    value, slope = evaluate("tanh", np.array([0.0, -0.0], dtype))
    np.testing.assert_array_equal(value, [0, 0])
    np.testing.assert_array_equal(np.signbit(value), [False, True])
    np.testing.assert_array_equal(slope, [1, 1])


@pytest.mark.parametrize("dtype", RANGE)
def test_relu_and_its_slope(dtype):
    largest, smallest = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    x = np.array([-np.inf, -largest, -smallest, -0.0, 0.0, smallest, largest, np.inf], dtype)
    values, slopes = evaluate("relu", x)
    np.testing.assert_array_equal(values, np.maximum(x, 0))
    np.testing.assert_array_equal(slopes, [0, 0, 0, 0, 0, 1, 1, 1])  # 0 at x = 0


def test_relu_of_nan_is_nan():
    assert np.isnan(evaluate("relu", np.array([np.nan]))[0][0])


@pytest.mark.parametrize("dtype", RANGE)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_symmetry(name, dtype):
    """tanh is odd, σ(x) + σ(−x) = 1, and both slopes are even."""
    x = points(dtype)
    (above, slope), (below, mirrored) = evaluate(name, x), evaluate(name, -x)
    np.testing.assert_array_equal(slope, mirrored)
    if name == "tanh":
        np.testing.assert_array_equal(above, -below)
    else:
        assert np.abs(above + below - 1).max() <= 2 * np.finfo(dtype).eps  # one rounding of each, and of the sum


def float32_loop(name):
    """The loop over a function and its signature for float32; all that it calls is inlined into it."""
    evaluate(name, np.zeros(1, np.float32))
    loop = LOOPS[name]
    return loop, next(signature for signature in loop.signatures if signature[0].dtype == types.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_is_computed_in_float32(name):
    loop, signature = float32_loop(name)
    assert double_arithmetic(loop.inspect_llvm(signature)) == []
    overload = getattr(activations, name).overloads[types.float32,]
    assert overload.signature.return_type in (types.float32, types.UniTuple(types.float32, 2))
    assert types.float64 not in overload.type_annotation.typemap.values()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loop_becomes_vector_code(name):
    loop, signature = float32_loop(name)
    assert len(packed_single(loop.inspect_asm(signature), half=True)) >= {"relu": 1, "exp": 8}.get(
        name, 10
    )  # operations of each
