"""Initialisers, the named parameters and their one buffer, and how many there are."""

import copy
import pickle

import numpy as np
import pytest

from rnnlab import CELLS, Recurrent
from rnnlab.params import INITIALISERS, Params, layer_shapes


def draw(name, rows, columns, hidden_size=1, seed=0):
    return INITIALISERS[name](np.random.default_rng(seed), rows, columns, hidden_size)


def gate_blocks(net, name):
    """The block of each gate, by the gate's name."""
    return dict(zip(net.cell.gates, np.split(net.params[name], len(net.cell.gates)), strict=True))


# Initialisers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INITIALISERS)
def test_initialiser_returns_the_shape_that_it_was_asked_for(name):
    for rows, columns in ((4, 4), (3, 7), (7, 3), (1, 5), (1, 1)):
        assert draw(name, rows, columns).shape == (rows, columns)


def assert_uniform(values, bound):
    """Uniform on (−bound, bound): within it, up to its ends, and with its variance bound²/3."""
    assert np.abs(values).max() <= bound
    assert values.min() < -0.99 * bound  # missed by 40,000 draws with probability 1e-87
    assert values.max() > 0.99 * bound
    # Standard errors of the mean, bound/√(3n), and of the variance, bound²·√(4/45/n).
    assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)
    assert abs(values.var() - bound**2 / 3) < 5 * bound**2 * np.sqrt(4 / 45 / values.size)


def test_uniform_is_bounded_by_the_hidden_size():
    assert_uniform(draw("uniform", 400, 100, hidden_size=25), 1 / 5)


def test_glorot_is_bounded_by_rows_and_columns():
    assert_uniform(draw("glorot", 400, 100), np.sqrt(6 / 500))


def test_gaussian_has_variance_one_over_columns():
    values = draw("gaussian", 400, 100)
    n = values.size
    assert abs(values.mean()) < 5 * 0.1 / np.sqrt(n)
    assert abs(values.var() - 0.01) < 5 * 0.01 * np.sqrt(2 / n)
    assert abs((values**4).mean() / 0.01**2 - 3) < 5 * np.sqrt(96 / n)  # the fourth moment of a normal distribution


@pytest.mark.parametrize(("rows", "columns"), [(9, 9), (12, 5), (5, 12)])
def test_orthogonal_has_orthonormal_rows_or_columns(rows, columns):
    q = draw("orthogonal", rows, columns)
    product = q.T @ q if rows >= columns else q @ q.T
    np.testing.assert_allclose(product, np.eye(min(rows, columns)), rtol=0, atol=1e-14)  # sums of 12 products below 1


def test_orthogonal_is_haar_distributed():
    """Every entry of a Haar matrix has mean 0 and variance 1/n, and det is +1 or −1 with equal probability.

    Without the correction of signs LAPACK's first entry would always be negative.
    """
    n, draws = 3, 4000
    rng = np.random.default_rng(1)
    q = np.array([INITIALISERS["orthogonal"](rng, n, n, n) for _ in range(draws)])
    assert np.abs(q.mean(axis=0)).max() < 5 / np.sqrt(n * draws)
    assert np.abs((q**2).mean(axis=0) - 1 / n).max() < 5 * np.sqrt(4 / 45 / draws)  # Var q² = 2(n−1)/(n²(n+2)) = 4/45
    assert abs((np.linalg.det(q) > 0).mean() - 0.5) < 5 * 0.5 / np.sqrt(draws)


def test_identity_and_zeros():
    np.testing.assert_array_equal(draw("identity", 3, 5), np.eye(3, 5))
    np.testing.assert_array_equal(draw("zeros", 3, 5), np.zeros((3, 5)))


@pytest.mark.parametrize("size", [50, 10])
def test_sparse_has_fifteen_numbers_a_row_and_spectral_radius_095(size):
    net = Recurrent("rnn_tanh", size, size, dtype="float64")
    net.initialise("sparse", "sparse", seed=1)
    hidden, inputs = net.params["weight_hh_l0"], net.params["weight_ih_l0"]
    for weight in (hidden, inputs):
        assert (np.count_nonzero(weight, axis=1) == min(15, size)).all()
    assert np.abs(np.linalg.eigvals(hidden)).max() == pytest.approx(0.95, rel=1e-12)
    # Only W_hh is rescaled: the non-zeros of W_ih keep their standard deviation, within five of its standard errors.
    count = min(15, size) * size
    assert inputs[inputs != 0].std() == pytest.approx(0.01, rel=5 / np.sqrt(2 * count))


def test_sparse_input_weights_keep_their_scale():
    weight = draw("sparse", 1000, 40)
    assert (np.count_nonzero(weight, axis=1) == 15).all()
    assert weight[weight != 0].std() == pytest.approx(0.01, rel=5 / np.sqrt(2 * 15_000))  # its standard error
    # Which columns are kept is drawn for each row: binomial, with p = 15/40.
    assert np.abs(np.count_nonzero(weight, axis=0) - 375).max() < 5 * np.sqrt(1000 * 0.375 * 0.625)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_each_gate_has_a_block_of_its_own(cell):
    """W_hh is g·Q for every gate, no two alike, and W_ih has orthonormal columns."""
    net = Recurrent(cell, 4, 9, dtype="float64")
    net.initialise("orthogonal", "orthogonal", gain=1.5, seed=2)
    hidden, features = gate_blocks(net, "weight_hh_l0"), gate_blocks(net, "weight_ih_l0")
    for gate in net.cell.gates:
        np.testing.assert_allclose(hidden[gate] @ hidden[gate].T, 1.5**2 * np.eye(9), rtol=0, atol=1e-14)
        np.testing.assert_allclose(features[gate].T @ features[gate], np.eye(4), rtol=0, atol=1e-14)
    for blocks in (hidden, features):
        assert len({block.tobytes() for block in blocks.values()}) == len(net.cell.gates)


def test_glorot_counts_the_rows_of_one_gate():
    net = Recurrent("lstm", 20, 50, dtype="float64")
    net.initialise("glorot", "glorot", seed=3)
    assert_uniform(net.params["weight_hh_l0"], np.sqrt(6 / 100))
    for block in gate_blocks(net, "weight_ih_l0").values():
        assert 0.98 * np.sqrt(6 / 70) < np.abs(block).max() <= np.sqrt(6 / 70)


def test_default_is_that_of_torch():
    """U(−1/√H, 1/√H) for all weights and biases."""
    net = Recurrent("lstm", 100, 100, 2, bidirectional=True, dtype="float64", seed=4)
    assert_uniform(net.params.flat, 0.1)
    for values in net.params.values():
        assert 0.09 < np.abs(values).max() <= 0.1


def test_biases_are_zero_unless_all_is_uniform():
    net = Recurrent("gru", 3, 4, seed=5)
    biases = ("bias_ih_l0", "bias_hh_l0")
    assert all(net.params[name].all() for name in biases)
    net.initialise("orthogonal", seed=5)
    assert not any(net.params[name].any() for name in biases)
    net.initialise("orthogonal", bias="uniform", seed=5)
    assert all(net.params[name].all() for name in biases)
    net.initialise(bias="zeros", seed=5)
    assert not any(net.params[name].any() for name in biases)


@pytest.mark.parametrize(
    ("cell", "gate"),
    [("lstm", "f"), ("lstm_peephole", "f"), ("lstm_coupled", "f"), ("gru", "z"), ("gru_reset_before", "z")],
)
def test_forget_bias_is_that_of_the_gate_that_keeps_the_state(cell, gate):
    """The two biases sum to it, whatever the others are."""
    options = {"bidirectional": True, "dtype": "float64"}
    net, plain = Recurrent(cell, 3, 4, 2, **options), Recurrent(cell, 3, 4, 2, **options, seed=6)
    net.initialise(forget_bias=1.5, seed=6)
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for name in ("bias_ih_", "bias_hh_"):
            for other, block in gate_blocks(net, name + suffix).items():
                if other != gate:
                    np.testing.assert_array_equal(block, gate_blocks(plain, name + suffix)[other])
        summed = gate_blocks(net, "bias_ih_" + suffix)[gate] + gate_blocks(net, "bias_hh_" + suffix)[gate]
        np.testing.assert_array_equal(summed, 1.5)


@pytest.mark.parametrize(("cell", "gate"), [("lstm", "f"), ("lstm_coupled", "f"), ("gru", "z")])
def test_chrono_spreads_the_time_scales(cell, gate):
    """b_f = ln U(1, T_max − 1) and b_i = −b_f: Tallec & Ollivier (2018), sec. 2."""
    net = Recurrent(cell, 3, 2000, dtype="float64")
    net.initialise("zeros", "zeros", chrono=101, seed=7)
    blocks = {name: gate_blocks(net, name) for name in ("bias_ih_l0", "bias_hh_l0")}
    assert not any(block.any() for block in blocks["bias_hh_l0"].values())
    steps = np.exp(blocks["bias_ih_l0"][gate])
    assert 1 <= steps.min() < 2  # missed by 2,000 draws with probability 1e-9
    assert 99 < steps.max() <= 100
    assert steps.mean() == pytest.approx(50.5, abs=5 * 99 / np.sqrt(12 * 2000))
    for other, block in blocks["bias_ih_l0"].items():
        if other == "i":
            np.testing.assert_array_equal(block, -blocks["bias_ih_l0"][gate])
        elif other != gate:
            np.testing.assert_array_equal(block, 0)


def test_chrono_of_the_shortest_dependency():
    """T_max = 3 draws from U(1, 2): between ln 1 and ln 2."""
    net = Recurrent("lstm", 3, 100)
    net.initialise(chrono=3, seed=8)
    block = gate_blocks(net, "bias_ih_l0")["f"]
    assert 0 <= block.min() < block.max() <= np.log(2)


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("lstm", {"recurrent": "he"}, "recurrent must be one of uniform, .*, zeros, got 'he'"),
        ("lstm", {"input": None}, "input must be one of uniform, .*, zeros, got None"),
        ("lstm", {"bias": "orthogonal"}, "bias must be one of uniform, zeros, got 'orthogonal'"),
        ("lstm", {"gain": 0}, r"gain must be a finite number in \(0, inf\), got 0"),
        ("lstm", {"gain": -1.0}, r"gain must be a finite number in \(0, inf\), got -1\.0"),
        ("lstm", {"gain": np.inf}, r"gain must be a finite number in \(0, inf\), got inf"),
        ("rnn_tanh", {"forget_bias": 1.0}, "forget_bias needs a cell with a forget or update gate .*, got 'rnn_tanh'"),
        ("lstm_no_forget", {"chrono": 10}, "chrono needs a cell with a forget or update gate .*, got 'lstm_no_forget'"),
        ("lstm", {"chrono": 10, "forget_bias": 1.0}, "forget_bias and chrono set the same bias"),
        ("lstm", {"chrono": 2}, "chrono must be a longest dependency of at least 3 steps, got 2"),
    ],
)
def test_initialise_names_what_is_wrong(cell, options, message):
    net = Recurrent(cell, 3, 4, seed=9)
    before = net.params.flat.copy()
    with pytest.raises(ValueError, match=message):
        net.initialise(**options)
    np.testing.assert_array_equal(net.params.flat, before)


@pytest.mark.parametrize("option", ["forget_bias", "chrono"])
def test_forget_bias_needs_biases(option):
    with pytest.raises(ValueError, match=f"{option} needs a cell with a forget or update gate and biases"):
        Recurrent("lstm", 3, 4, bias=False).initialise(**{option: 5})


@pytest.mark.parametrize("options", [{"forget_bias": np.nan}, {"forget_bias": "1"}, {"chrono": np.inf}, {"gain": "2"}])
def test_initialise_refuses_what_is_no_number(options):
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))} must"):
        Recurrent("lstm", 3, 4).initialise(**options)


# Named parameters -----------------------------------------------------------------------------------------------------

SHAPES = {"weight": (2, 3), "bias": (2,), "scale": (1,)}


def numbered(shapes=SHAPES, start=0, dtype="float64"):
    """Parameters whose buffer counts up from `start`."""
    params = Params(shapes, np.dtype(dtype))
    params.flat[...] = np.arange(start, start + params.flat.size)
    return params


def test_params_are_an_ordered_mapping():
    params = numbered()
    assert list(params) == ["weight", "bias", "scale"]
    assert len(params) == 3
    assert "bias" in params
    assert {name: array.shape for name, array in params.items()} == SHAPES
    assert repr(params) == "Params(weight: (2, 3), bias: (2,), scale: (1,))"
    with pytest.raises(KeyError, match="missing"):
        params["missing"]


def test_params_live_in_one_buffer():
    params = numbered()
    np.testing.assert_array_equal(params["weight"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(params["bias"], [6, 7])
    params["bias"] = np.array([10.0, 11.0])
    params["weight"][0, 0] = -1
    params.flat[8] = 12
    np.testing.assert_array_equal(params.flat, [-1, 1, 2, 3, 4, 5, 10, 11, 12])
    assert params["scale"][0] == 12


def test_assigned_values_are_copied():
    params, values = numbered(), np.array([1.0, 2.0])
    params["bias"] = values
    values[0] = 5
    np.testing.assert_array_equal(params["bias"], [1, 2])


def test_like_has_the_same_names_and_zeros():
    params = numbered(dtype="float32")
    other = params.like()
    assert {name: array.shape for name, array in other.items()} == SHAPES
    assert other.flat.dtype == np.float32
    assert not other.flat.any()
    other.flat[...] = 7
    np.testing.assert_array_equal(params.flat, np.arange(9))


def test_joined_params_stay_in_step():
    first, second = numbered(), numbered({"bias": (2,)}, start=9)
    joined = Params.join({"rnn": first, "readout": second})
    assert list(joined) == ["rnn.weight", "rnn.bias", "rnn.scale", "readout.bias"]
    np.testing.assert_array_equal(joined.flat, np.arange(11))
    joined["rnn.bias"] = np.array([20.0, 21.0])
    second["bias"] = np.array([30.0, 31.0])
    first.flat[0] = 40
    np.testing.assert_array_equal(joined.flat, [40, 1, 2, 3, 4, 5, 20, 21, 8, 30, 31])
    np.testing.assert_array_equal(first["bias"], [20, 21])
    np.testing.assert_array_equal(first.flat, joined.flat[:9])
    joined.flat += 1
    assert first["weight"][0, 0] == 41
    assert second["bias"][1] == 32


def test_parts_of_another_buffer_are_refused():
    """A second join would move the part away from the first."""
    part = numbered()
    Params.join({"rnn": part})
    with pytest.raises(ValueError, match="rnn already belongs to a model"):
        Params.join({"rnn": part})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda params: pickle.loads(pickle.dumps(params))])
def test_a_copy_is_one_buffer_again(duplicate):
    params = numbered()
    other = duplicate(params)
    other.flat[...] = 7
    assert all((array == 7).all() for array in other.values())
    assert params.flat[1] == 1


# Counts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "sizes", "options", "count"),
    [
        ("rnn_tanh", (10, 20), {}, 640),  # 20·(10 + 20 + 2)
        ("rnn_tanh", (1, 1), {}, 4),
        ("gru", (10, 20), {}, 1920),  # 3·20·32
        ("lstm", (10, 20), {}, 2560),  # 4·20·32
        ("lstm", (10, 20), {"bias": False}, 2400),  # 4·20·30
        ("lstm", (10, 20, 2), {}, 5920),  # 2560 + 4·20·42
        ("lstm", (10, 20), {"bidirectional": True}, 5120),
        ("lstm", (10, 20, 2), {"bidirectional": True}, 15040),  # 2·(2560 + 4·20·62)
        ("gru", (28, 128, 3), {}, 258_816),  # 3·128·158 + 2·3·128·258
        ("lstm_no_forget", (10, 20), {}, 1920),  # 3·20·32
        ("lstm_coupled", (10, 20), {}, 1920),
        ("lstm_peephole", (10, 20), {}, 2620),  # 2560 + 3·20
        ("gru_reset_before", (10, 20), {}, 1920),
    ],
)
def test_counts(cell, sizes, options, count):
    net = Recurrent(cell, *sizes, **options)
    assert net.params.flat.size == count
    assert sum(array.size for array in net.params.values()) == count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_shapes_of_a_layer(cell, bias):
    row = CELLS[cell]
    G, P = len(row.gates), len(row.peepholes)
    want = {"weight_ih": (G * 5, 3), "weight_hh": (G * 5, 5)}
    want |= {"bias_ih": (G * 5,), "bias_hh": (G * 5,)} if bias else {}
    want |= {"peephole": (P * 5,)} if P else {}
    assert layer_shapes(row, 3, 5, bias) == want
