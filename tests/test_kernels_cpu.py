"""The CPU kernels of every cell: forward, gradients and Jacobian against the textbook; types and instructions."""

import itertools
import platform
import re
from functools import cache

import naive
import numpy as np
import pytest
from conftest import (
    TOLERANCE,
    as_state,
    double_arithmetic,
    packed_single,
    parts_of,
    random_network,
    random_state,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit, typeof, types
from numba.np.numpy_support import from_dtype

from rnnlab import CELLS, Recurrent
from rnnlab.kernels import LayerWeights, backend, cpu
from rnnlab.kernels.backward import backward_kernel
from rnnlab.kernels.forward import forward_kernel
from rnnlab.kernels.jacobian import diagonals_kernel
from rnnlab.kernels.simd import VECTOR_BYTES
from rnnlab.timing import wall_clock

#: Units in one panel of float64.
V = VECTOR_BYTES // 8


def run_both(net, params, T, B, *, lengths=None, initial=True, rng):
    """Forward and backward, of a network and of the textbook, on random numbers: (trace, gradients) of each."""
    x = rng.normal(size=(T, B, net.input_size)).astype(net.dtype)
    state = random_state(rng, net, B) if initial else None
    d_output = rng.normal(size=(T, B, net.directions * net.hidden_size)).astype(net.dtype)
    d_final = random_state(rng, net, B)
    trace = net.forward(x, state, lengths)
    textbook = naive.forward(net.cell.name, params, x, state, lengths, net.num_layers, net.bidirectional)
    return (trace, net.backward(trace, d_output, d_final)), (textbook, naive.backward(textbook, d_output, d_final))


def errors(got, want):
    """The relative error of every array that a forward and a backward pass return, by name."""
    (trace, gradients), (textbook, exact) = got, want
    pairs = {"output": (trace.output, textbook.output), "dx": (gradients.x, exact.x)}
    for name, mine, theirs in (("final", trace.final, textbook.final), ("dstate", gradients.state, exact.state)):
        pairs |= {f"{name} {s}": pair for s, pair in enumerate(zip(parts_of(mine), parts_of(theirs), strict=True))}
    for name in ("h", "c"):
        pairs[name] = getattr(trace, name), getattr(textbook, name)
        pairs[f"d{name}"] = getattr(gradients, name), getattr(exact, name)
    assert gradients.params.keys() == exact.params.keys()
    pairs |= {f"d {name}": (gradients.params[name], exact.params[name]) for name in exact.params}
    return {name: relative_error(*pair) for name, pair in pairs.items()}


def worst(found):
    """(name, error) of the largest relative error; NaN, with which nothing compares, is the largest."""
    return max(found.items(), key=lambda item: np.inf if np.isnan(item[1]) else item[1])


SHAPES = {
    "plain": {},
    "stacked": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "variable length": {"lengths": [4, 7, 1, 6]},
    "all of it": {"num_layers": 2, "bidirectional": True, "lengths": [4, 6, 1, 6]},  # none as long as x
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_float64_equals_the_textbook(cell, shape):
    options = dict(SHAPES[shape])
    lengths = options.pop("lengths", None)
    net, params = random_network(cell, 3, V + 3, **options, seed=1)
    found = errors(*run_both(net, params, 7, 4, lengths=lengths, rng=np.random.default_rng(2)))
    assert worst(found)[1] <= TOLERANCE, found


@settings(max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("cell", CELLS)
def test_float64_equals_the_textbook_for_any_shape(cell, data):
    sizes = st.integers(1, 9)
    T, B, I, L = data.draw(sizes), data.draw(sizes), data.draw(sizes), data.draw(st.integers(1, 3))
    H = data.draw(sizes | st.sampled_from([V - 1, V, V + 1, 2 * V + 1]))
    bidirectional, bias, initial = (data.draw(st.booleans()) for _ in range(3))
    lengths = data.draw(st.none() | st.lists(st.integers(1, T), min_size=B, max_size=B))
    net, params = random_network(cell, I, H, L, bidirectional=bidirectional, bias=bias, seed=T * B)
    rng = np.random.default_rng(H)
    found = errors(*run_both(net, params, T, B, lengths=lengths, initial=initial, rng=rng))
    assert worst(found)[1] <= TOLERANCE, found


@pytest.mark.parametrize("cell", CELLS)
def test_float32_equals_the_textbook(cell):
    """Weights of N(0, 1/H) keep the adjoint from growing, so that roundings add up as a random walk over T steps."""
    T, H = 64, 2 * V + 5
    net, params = random_network(cell, 5, H, dtype="float32", scale=H**-0.5, seed=3)
    found = errors(*run_both(net, params, T, 3, lengths=[T, 40, T], rng=np.random.default_rng(4)))
    # 4: the roundings of one step, of which the sums over H + I numbers and four gates are the larger part.
    assert worst(found)[1] <= 4 * np.finfo(np.float32).eps * np.sqrt(T), found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru_reset_before"])
def test_without_keeping_the_states_are_the_same(cell, dtype):
    net, _ = random_network(cell, 3, V + 3, 2, bidirectional=True, dtype=dtype)
    x = np.random.default_rng(0).normal(size=(6, 3, 3)).astype(dtype)
    kept, lean = net.forward(x, lengths=[6, 2, 5]), net.forward(x, lengths=[6, 2, 5], keep=False)
    for name in ("output", "h", "c"):
        np.testing.assert_array_equal(getattr(lean, name), getattr(kept, name))
    np.testing.assert_array_equal(lean.final, kept.final)
    assert all(layer.saved.size > 0 for layer in kept.layers)
    assert all(layer.saved.size == 0 for layer in lean.layers)


# The log-scaled adjoint -----------------------------------------------------------------------------------------------


def scaled_and_plain(net, T, B, *, lengths=None, seed=0):
    """The layers of a scaled and of a plain backward pass, and dL/dx of both."""
    rng = np.random.default_rng(seed)
    trace = net.forward(rng.normal(size=(T, B, net.input_size)).astype(net.dtype), lengths=lengths)
    d_output = rng.normal(size=trace.output.shape).astype(net.dtype)
    d_final = random_state(rng, net, B)
    scaled, dx, exponent = net.backpropagate(trace, d_output, d_final, scaled=True)
    plain, plain_dx, none = net.backpropagate(trace, d_output, d_final)
    assert none is None
    return (scaled, np.ldexp(dx, exponent[:, :, None])), (plain, plain_dx)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_scaled_adjoint_equals_the_plain_one(cell, shape):
    """Powers of two are exact: only the sums over the two directions of a layer may round differently."""
    options = dict(SHAPES[shape])
    lengths = options.pop("lengths", None)
    net, _ = random_network(cell, 3, V + 3, **options, seed=5)
    (scaled, dx), (plain, plain_dx) = scaled_and_plain(net, 7, 4, lengths=lengths, seed=6)
    assert relative_error(dx, plain_dx) <= 4 * np.finfo(np.float64).eps
    for one, other in zip(scaled, plain, strict=True):
        assert one.weights is None
        assert relative_error(np.ldexp(one.state, one.exponent[:, :, None]), other.state) <= 4 * np.finfo(float).eps
        assert relative_error(np.ldexp(one.direct, one.direct_exponent[:, :, None]), other.direct) <= 1e-15
        largest = np.abs(one.state[:, 1:]).max(axis=(0, 3))
        inside = np.arange(7)[:, None] < np.array(lengths or [7] * 4)
        assert ((largest > 0) & (largest < 2))[inside].all()  # a sum of two numbers below 1


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@pytest.mark.parametrize(("T", "B", "H"), [(5, 1, 8 * V + 3), (5, 1, 17 * V), (70, 5, 9 * V - 1)])
def test_scaled_adjoint_of_many_units_equals_the_plain_one(monkeypatch, cell, T, B, H):
    """One sequence has wider panels in the plain pass; the last shape has two chunks of steps."""
    monkeypatch.setattr(cpu, "chunk_steps", lambda cell, B, H: 250 // B)
    net, _ = random_network(cell, 3, H, scale=H**-0.5, seed=7)
    (scaled, dx), (plain, plain_dx) = scaled_and_plain(net, T, B, seed=8)
    assert relative_error(dx, plain_dx) <= TOLERANCE
    state = np.ldexp(scaled[0].state, scaled[0].exponent[:, :, None])
    assert relative_error(state, plain[0].state) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_scaled_adjoint_neither_under_nor_overflows(weight, dtype):
    """One tanh unit at rest has slope 1: dL/dh_t = w^(T−t), here a power of two and so exactly known."""
    T = 5000
    net = Recurrent("rnn_tanh", 1, 1, dtype=dtype)
    net.params.flat[...] = 0
    net.params["weight_hh_l0"] = np.full((1, 1), weight, dtype)
    trace = net.forward(np.zeros((T, 1, 1), dtype))
    d_final = np.ones((1, 1, 1), dtype)
    (layer,), _, _ = net.backpropagate(trace, np.zeros((T, 1, 1), dtype), d_final, scaled=True)
    mantissa, exponent = np.frexp(layer.state[0, :, 0, 0])
    assert (mantissa == 0.5).all()
    np.testing.assert_array_equal(exponent - 1 + layer.exponent[:, 0], np.log2(weight) * np.arange(T, -1, -1))
    with np.errstate(over="ignore", invalid="ignore"):  # the plain adjoint makes ∞ and ∞·0
        (plain,), _, _ = net.backpropagate(trace, np.zeros((T, 1, 1), dtype), d_final)
    assert plain.state[0, 0, 0, 0] == (0 if weight < 1 else np.inf)


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_scaled_adjoint_in_float32_follows_float64(cell):
    """Where the plain adjoint in float32 has long been 0, the scaled one still has the digits of the float64 one."""
    T = 400
    x = np.random.default_rng(7).normal(size=(T, 2, 3))
    states = {}
    for dtype in ("float32", "float64"):
        net, _ = random_network(cell, 3, 8, dtype=dtype, scale=0.1, seed=8)
        trace = net.forward(x.astype(dtype))
        d_output = np.zeros_like(trace.output)
        d_output[-1] = 1
        (layer,), _, _ = net.backpropagate(trace, d_output, scaled=dtype == "float32")
        states[dtype] = layer
    with np.errstate(under="ignore"):
        true = np.ldexp(states["float32"].state.astype(float), states["float32"].exponent[:, :, None])
    exact = states["float64"].state
    assert 0 < np.abs(exact[0, 0]).max() < np.finfo(np.float32).smallest_subnormal
    for t in (0, T // 2, T - 1):
        # Each of T products is off by a few roundings of 6e-8, which all point the same way at worst.
        assert relative_error(true[0, t], exact[0, t]) <= 4 * T * np.finfo(np.float32).eps


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_a_gradient_that_vanishes_costs_no_more_than_another(cell):
    """Subnormal numbers took Intel's cores 4 to 22 times as long; within twice lies what else runs on this machine."""
    net, _ = random_network(cell, 2, 50, dtype="float32", scale=0.1, seed=11)
    trace = net.forward(np.random.default_rng(12).normal(size=(100, 20, 2)).astype(np.float32))
    last, every = np.zeros_like(trace.output), np.ones_like(trace.output)
    last[-1] = 1e-33
    times = [[wall_clock(lambda d=d: net.backward(trace, d)) for d in (last, every)] for _ in range(20)]
    vanishing, other = np.min(times, axis=0)
    assert vanishing <= 2 * other


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="subnormal numbers are kept elsewhere")
@pytest.mark.parametrize("parties", [1, 2])
def test_subnormal_gradients_are_zero_and_only_within_the_kernel(monkeypatch, parties):
    """h_t = h_{t−1} / 2 from the smallest normal number: the next gradient back would be subnormal."""
    smallest = np.finfo(np.float32).tiny
    net = Recurrent("rnn_relu", 1, 1, dtype="float32", seed=0)
    net.params.flat[...] = 0
    net.params["weight_hh_l0"] = np.full((1, 1), 0.5, np.float32)
    monkeypatch.setattr(cpu, "plan", lambda *_: (parties, False))
    B = 4
    trace = net.forward(np.zeros((2, B, 1), np.float32), np.ones((1, B, 1), np.float32))
    d_output = np.zeros((2, B, 1), np.float32)
    d_output[-1] = smallest
    gradients = net.backward(trace, d_output)
    assert (gradients.h[0][2] == smallest).all()
    assert (gradients.h[0][:2] == 0).all()
    assert smallest * np.float32(0.5) > 0  # numbers of the caller are as before, and those of its threads
    again = net.forward(np.zeros((1, B, 1), np.float32), np.full((1, B, 1), smallest))
    assert (again.output == smallest / 2).all()
    (layer,), _, _ = net.backpropagate(trace, d_output, scaled=True)
    np.testing.assert_array_equal(np.ldexp(layer.state[0].astype(float), layer.exponent[:, :, None])[0], smallest / 4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_error_carousel_is_constant_to_the_last_bit(dtype):
    """lstm_no_forget without recurrent weights: dL/dc of the last step stays as it is for 1,000 steps (oracle 8)."""
    T, H = 1000, V + 3
    net, _ = random_network("lstm_no_forget", 3, H, bias=False, dtype=dtype, seed=9)
    net.params["weight_hh_l0"] = np.zeros((3 * H, H), dtype)
    rng = np.random.default_rng(10)
    trace = net.forward(rng.normal(0, 0.1, (T, 2, 3)).astype(dtype))
    d_output = np.zeros_like(trace.output)
    d_output[-1] = rng.normal(size=(2, H))
    dc = net.backward(trace, d_output).c[0]
    assert np.abs(dc[T - 1]).min() > 0
    np.testing.assert_array_equal(dc[: T - 1], np.broadcast_to(dc[T - 1], (T - 1, 2, H)))


# Jacobian -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_jacobian_equals_the_textbook(cell):
    """Every step, sequence, layer and direction; past the end of a sequence the state is held."""
    T, lengths = 5, np.array([5, 2, 4])
    net, params = random_network(cell, 3, V + 1, 2, bidirectional=True, seed=11)
    trace = net.forward(np.random.default_rng(12).normal(size=(T, 3, 3)), lengths=lengths)
    for k, layer in enumerate(trace.layers):
        weights = naive.layer_params(params, k, 2)
        for t in range(T):
            got = net.jacobian(trace, t, k)
            for b in range(3):
                if t >= lengths[b]:
                    np.testing.assert_array_equal(got[b], np.eye(len(got[b])))
                    continue
                want = naive.jacobian(cell, weights, layer.x[t, b], *layer.state[:, t, b])
                assert relative_error(got[b], want) <= TOLERANCE


@pytest.mark.parametrize("cell", CELLS)
def test_jacobian_equals_finite_differences(cell):
    step, H = 1e-5, 5
    net, _ = random_network(cell, 3, H, seed=13)
    rng = np.random.default_rng(14)
    x, S = rng.normal(size=(1, 1, 3)), len(net.cell.states)
    state = np.stack(parts_of(random_state(rng, net, 1)))

    def after(old):
        return np.ravel(parts_of(net.forward(x, as_state(old)).final))

    units = np.eye(S * H).reshape(S * H, *state.shape)
    columns = [(after(state + step * unit) - after(state - step * unit)) / (2 * step) for unit in units]
    got = net.jacobian(net.forward(x, as_state(state)), 0)[0]
    assert relative_error(got, np.stack(columns, axis=1)) <= 1e-9  # step² of truncation, 1e-16 / step of rounding


# Types and instructions -----------------------------------------------------------------------------------------------


def array_of(dimensions, element=types.float32):
    return types.Array(element, dimensions, "C")


#: The factory of each kernel, and what it takes after the cell and the type.
KERNELS = {
    "forward": (forward_kernel, True),
    "infer": (forward_kernel, False),
    "backward": (backward_kernel, "plain"),
    "scaled": (backward_kernel, "scaled"),
    "jacobian": (diagonals_kernel,),
}


def kernel_of(cell, kind, dtype):
    make, *options = KERNELS[kind]
    return make(CELLS[cell], np.dtype(dtype), *options)


@cache
def signatures(cell, dtype):
    """What each kernel of a cell is called with, by kind: the calls are recorded, and no kernel runs."""
    calls = []

    def called(kernel, arguments, parties, by_units):
        numbers = np.zeros(1, np.int64)
        calls.append(tuple(typeof(argument) for argument in (arguments, numbers, numbers, parties, by_units, 0)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "run_together", called)
        net, x = Recurrent(cell, 2, 3, dtype=dtype), np.zeros((4, 2, 2), dtype)
        trace, d_output = net.forward(x), np.zeros((4, 2, 3), dtype)
        net.forward(x, keep=False)
        net.backpropagate(trace, d_output)
        net.backpropagate(trace, d_output, scaled=True)
    assert {argument.dtype for call in calls for argument in call[0] if isinstance(argument, types.Array)} == {
        from_dtype(np.dtype(dtype)),
        types.int64,
    }
    a = array_of
    return dict(zip(KERNELS, [*calls, (a(2), a(1), a(2), a(3), a(3), a(4))], strict=True))


@cache
def compiled(cell, kind):
    """A float32 kernel and its signature, compiled anew: Numba's cache keeps neither types nor assembly."""
    signature = signatures(cell, "float32")[kind]
    cached = kernel_of(cell, kind, np.float32)
    assert set(cached.signatures) <= {signature}
    options = {name: cached.targetoptions[name] for name in ("nogil", "error_model", "fastmath")}
    fresh = njit(**options)(cached.py_func)
    fresh.compile(signature)
    return fresh, signature


@pytest.mark.parametrize("cell", CELLS)
def test_float32_equations_hold_no_float64(cell):
    row = CELLS[cell]

    def numbers(count):
        return types.UniTuple(types.float32, count) if count else types.Tuple(())

    G, S, P, K = len(row.gates), len(row.states), len(row.peepholes), row.saved
    both = (numbers(G), numbers(G), numbers(P), numbers(S)), (numbers(K), numbers(P), numbers(S))
    functions = [*zip((row.step, row.step_backward), both, strict=True)]
    one = types.float32
    if row.output is not None:
        functions.append((row.output, (one, one, one)))
    if row.reset is not None:
        functions += zip(row.reset, ((one, one, one), (numbers(2), one)), strict=True)
    for function, signature in functions:
        function.compile(signature)
        overload = function.overloads[signature]
        assert types.float64 not in overload.type_annotation.typemap.values()
        assert "float64" not in str(overload.signature)


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        *itertools.product(["lstm", "lstm_peephole", "gru", "gru_reset_before"], ["forward", "backward", "jacobian"]),
        ("lstm", "scaled"),
    ],
)
def test_float32_kernels_hold_no_float64(cell, kind):
    """These four take every branch of the factories: two states, peepholes, separate ax and ah, a reset first.

    A scaled adjoint differs by what is done before the cell, which is the same for all.
    """
    kernel, signature = compiled(cell, kind)
    typed = kernel.overloads[signature].type_annotation.typemap
    assert any("float32" in str(kind) for kind in typed.values())
    assert [name for name, kind in typed.items() if "float64" in str(kind)] == []
    assert double_arithmetic(kernel.inspect_llvm(signature)) == []


def outside_tiles(assembly):
    """The vector instructions of `packed_single` that no product tile has: those add, and multiply only to add."""
    return [line for line in packed_single(assembly) if not re.match(r"v?(?:add|fmadd\d+)ps", line)]


@pytest.mark.parametrize("kind", ["forward", "infer"])
def test_forward_of_the_lstm_is_vector_code_throughout(kind):
    kernel, signature = compiled("lstm", kind)
    assembly = kernel.inspect_asm(signature)
    # 5 activations, each with three negated multiply-adds and the square of what they leave.
    assert len(outside_tiles(assembly)) >= 20
    # Not one multiplication or division of single numbers: alone are added only the two biases of each gate.
    assert re.findall(r"\bv?(?:mul|div|max|fn?m(?:add|sub)\d+)ss\b", assembly) == []


def test_backward_of_the_lstm_is_vector_code():
    kernel, signature = compiled("lstm", "backward")
    assembly = kernel.inspect_asm(signature)
    # The products of `step_backward`: six, of which one is a multiply-add.
    assert len(outside_tiles(assembly)) >= 5
    # None of its five others in single numbers; single multiply-adds end the rows of `add_narrow` that fill no vector.
    assert re.findall(r"\bv?(?:mul|fmsub\d+|fnm(?:add|sub)\d+)ss\b", assembly) == []


@pytest.mark.parametrize("cell", ["lstm_peephole", "gru_reset_before"])
def test_warmup_compiles_all_that_a_network_needs(cell):
    """No array that the network passes on has another layout than those of `warmup`: nothing is compiled again."""
    cpu.warmup(cell, "float64")
    kernels = {kind: kernel_of(cell, kind, np.float64) for kind in KERNELS}
    for kind in ("forward", "backward", "jacobian"):
        assert len(kernels[kind].signatures) == 1
    for T, B, H in ((1, 1, 1), (5, 3, 4)):
        net, params = random_network(cell, 1, H, 2, bidirectional=True)
        run_both(net, params, T, B, lengths=np.full(B, T), rng=np.random.default_rng(0))
        scaled_and_plain(net, T, B)
        net.forward(np.zeros((T, B, 1)), keep=False)
    assert {kind: len(kernel.signatures) for kind, kernel in kernels.items()} == dict.fromkeys(KERNELS, 1)


# Layouts of what a network is given ----------------------------------------------------------------------------------


def every_other(a):
    wide = np.full((2 * a.shape[0], *a.shape[1:]), np.nan, a.dtype)
    wide[::2] = a
    return wide[::2]


def at_byte(offset, a):
    """A copy of `a` that begins `offset` bytes after where a number may begin."""
    placed = np.ndarray(a.shape, a.dtype, np.zeros(a.nbytes + offset, np.uint8), offset)
    placed[...] = a
    assert not placed.flags.aligned
    return placed


LAYOUTS = {
    "every other": every_other,
    "last axis": lambda a: every_other(np.ascontiguousarray(a.T)).T,
    "Fortran": np.asfortranarray,
    "backwards": lambda a: a[::-1].copy()[::-1],
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(0, 1)).swapaxes(0, 1),
    "odd address": lambda a: at_byte(3, a),
    "half aligned": lambda a: at_byte(4, a),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("lengths", [None, [6, 4, 5]])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_memory_layout_of_arguments_does_not_matter(cell, layout, lengths):
    """The same numbers, to the last bit, from the same kernels: none is compiled anew for a layout."""
    T, B, I, H = 6, 3, 4, V + 3
    net, _ = random_network(cell, I, H, seed=16)
    rng = np.random.default_rng(17)
    x, d_output = rng.normal(size=(T, B, I)), rng.normal(size=(T, B, H))
    state, d_final = random_state(rng, net, B), random_state(rng, net, B)
    results, signatures = [], []
    for form in (np.copy, LAYOUTS[layout]):
        x_, d_output_ = form(x), form(d_output)
        state_, d_final_ = (as_state(form(part) for part in parts_of(s)) for s in (state, d_final))
        trace = net.forward(x_, state_, lengths)
        gradients = net.backward(trace, d_output_, d_final_)
        lean = net.forward(x_, state_, lengths, keep=False)
        finals = [*parts_of(trace.final), *parts_of(gradients.state)]
        results.append([trace.output, *finals, gradients.x, gradients.params.flat, gradients.h[0], lean.output])
        np.testing.assert_array_equal(x_, x)  # nothing is written to an argument
        np.testing.assert_array_equal(d_output_, d_output)
        signatures.append([kernel_of(cell, kind, np.float64).signatures for kind in ("forward", "infer", "backward")])
    for got, want in zip(*results, strict=True):
        np.testing.assert_array_equal(got, want)
    assert signatures[0] == signatures[1]


def test_backend_names_what_it_takes():
    assert backend("cpu") is cpu
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        backend("tpu")


def test_layer_functions_take_what_they_document():
    """The kernels below `Recurrent`: one layer, zero biases, a state of (S, B, H)."""
    rng = np.random.default_rng(15)
    cell, (T, B, I, H) = CELLS["gru"], (4, 2, 3, 5)
    zero = np.zeros(3 * H)
    weights = LayerWeights(rng.normal(size=(3 * H, I)), rng.normal(size=(3 * H, H)), zero, zero, np.zeros(0))
    x, state = rng.normal(size=(T, B, I)), rng.normal(size=(1, B, H))
    trace = cpu.forward(cell, x, weights, state, np.full(B, T))
    params = {"weight_ih_l0": weights.weight_ih, "weight_hh_l0": weights.weight_hh}
    textbook = naive.forward("gru", params, x, state)
    assert relative_error(trace.state[0], textbook.h[0]) <= TOLERANCE
    d_output, d_final = rng.normal(size=(T, B, H)), rng.normal(size=(1, B, H))
    gradients, exact = (
        cpu.backward(cell, trace, weights, d_output, d_final),
        naive.backward(textbook, d_output, d_final),
    )
    assert relative_error(gradients.state[0], exact.h[0]) <= TOLERANCE
    assert relative_error(gradients.weights.weight_hh, exact.params["weight_hh_l0"]) <= TOLERANCE
    np.testing.assert_array_equal(gradients.direct, d_output)
