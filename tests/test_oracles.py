"""What mathematics says of a gradient in a recurrent network, each statement a test by its name."""

import naive
import numpy as np
import pytest
from conftest import (
    DIFFERENCE_TOLERANCE,
    TOLERANCE,
    as_state,
    directional_difference,
    parts_of,
    random_direction,
    random_network,
    random_state,
    relative_error,
)

from rnnlab import CELLS, Recurrent


def state_of(trace, slot, k=0):
    """The state of layer-direction k at a slot, in the form of `Trace.final`."""
    return as_state(slots[k][slot][None] for slots in (trace.h, trace.c) if slots)


def split(net, vector):
    """A vector (B, S·H) in the form of a state."""
    return as_state(part[None] for part in np.split(vector, len(net.cell.states), axis=1))


def one_step_back(net, trace, step, d_state):
    """Backpropagate d_state (B, S·H) of slot step + 1 through that one step: the gradients of the step alone."""
    one = net.forward(trace.layers[0].x[step : step + 1], state_of(trace, step))
    return net.backward(one, np.zeros_like(one.output), split(net, d_state))


# Identities ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_sum_over_lags_equals_weight_gradient(cell):
    """Σ_{t,k} (∂L_t/∂h_t)(∂h_t/∂h_k)(∂⁺h_k/∂W) = dL/dW: Pascanu, Mikolov & Bengio (2013), eq. 3–5; h is (h, c)."""
    T, B, H = 6, 2, 5
    net, _ = random_network(cell, 3, H, seed=1)
    rng = np.random.default_rng(2)
    trace = net.forward(rng.normal(size=(T, B, 3)), random_state(rng, net, B))
    d_output = rng.normal(size=(T, B, H))
    total = net.params.like()
    for t in range(T, 0, -1):
        adjoint = np.zeros((B, len(net.cell.states) * H))
        adjoint[:, :H] = d_output[t - 1]
        for k in range(t, 0, -1):
            total.flat += one_step_back(net, trace, k - 1, adjoint).params.flat
            adjoint = np.einsum("bi,bij->bj", adjoint, net.jacobian(trace, k - 1))
    want = net.backward(trace, d_output).params
    for name in want:
        assert relative_error(total[name], want[name]) <= TOLERANCE


@pytest.mark.parametrize("cell", CELLS)
def test_jacobian_dot_product(cell):
    """⟨Jv, u⟩ = ⟨v, Jᵀu⟩: J made of diagonals and W_hh, Jᵀu by one step of backpropagation."""
    T, B, H = 4, 3, 11
    net, _ = random_network(cell, 3, H, seed=3)
    rng = np.random.default_rng(4)
    trace = net.forward(rng.normal(size=(T, B, 3)), random_state(rng, net, B))
    for t in range(T):
        J = net.jacobian(trace, t)
        u, v = rng.normal(size=(2, B, J.shape[1]))
        forwards = np.einsum("bi,bij,bj->b", u, J, v)
        back = np.concatenate([part[0] for part in parts_of(one_step_back(net, trace, t, u).state)], axis=1)
        assert relative_error(np.einsum("bi,bi->b", v, back), forwards) <= TOLERANCE


@pytest.mark.parametrize("cell", CELLS)
def test_product_of_jacobians_is_the_adjoint(cell):
    """dL/dstate_0 = (J_T ⋯ J_1)ᵀ dL/dstate_T."""
    T, B = 8, 2
    net, _ = random_network(cell, 3, 7, seed=5)
    rng = np.random.default_rng(6)
    trace = net.forward(rng.normal(size=(T, B, 3)))
    d_final = random_state(rng, net, B)
    adjoint = np.concatenate([part[0] for part in parts_of(d_final)], axis=1)
    for t in range(T - 1, -1, -1):
        adjoint = np.einsum("bi,bij->bj", adjoint, net.jacobian(trace, t))
    gradients = net.backward(trace, np.zeros_like(trace.output), d_final)
    assert relative_error(np.stack(parts_of(gradients.state)), np.stack(parts_of(split(net, adjoint)))) <= TOLERANCE


# Finite differences ---------------------------------------------------------------------------------------------------


class LinearLoss:
    """L = ⟨d_output, output⟩ + ⟨d_final, final⟩ of two layers in both directions, with sequences of unequal length."""

    lengths = (6, 3, 5)

    def __init__(self, cell, seed):
        self.net, _ = random_network(cell, 3, 5, 2, bidirectional=True, seed=seed)
        rng = self.rng = np.random.default_rng(seed)
        self.x, self.state = rng.normal(size=(6, 3, 3)), random_state(rng, self.net, 3)
        self.d_final = random_state(rng, self.net, 3)
        trace = self.trace()
        past = np.arange(6)[:, None] >= np.array(self.lengths)
        self.d_output = np.where(past[:, :, None], 0, rng.normal(size=trace.output.shape))
        self.gradients = self.net.backward(trace, self.d_output, self.d_final)

    def trace(self):
        return self.net.forward(self.x, self.state, self.lengths)

    def __call__(self):
        trace = self.trace()
        finals = zip(parts_of(self.d_final), parts_of(trace.final), strict=True)
        return (self.d_output * trace.output).sum() + sum((d * part).sum() for d, part in finals)

    def assert_differences(self, array, gradient):
        """The slope along a random direction is that of differences of the loss."""
        direction = random_direction(self.rng, array)
        difference = directional_difference(self, array, direction)
        # The loss is a sum of some 200 terms around 1.
        assert (gradient * direction).sum() == pytest.approx(difference, abs=100 * DIFFERENCE_TOLERANCE)


@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences_of_initial_state(cell):
    loss = LinearLoss(cell, seed=7)
    for part, gradient in zip(parts_of(loss.state), parts_of(loss.gradients.state), strict=True):
        loss.assert_differences(part, gradient)


@pytest.mark.parametrize("cell", CELLS)
def test_finite_differences_of_loss(cell):
    """Every parameter, and x."""
    loss = LinearLoss(cell, seed=8)
    loss.assert_differences(loss.x, loss.gradients.x)
    for name, values in loss.net.params.items():
        loss.assert_differences(values, loss.gradients.params[name])


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_scalar_linear_rnn():
    """x_T = wᵀx_0, dx_T/dw = T wᵀ⁻¹x_0, d²x_T/dw² = T(T − 1) wᵀ⁻²x_0; a relu unit with w, x_0 > 0 is linear."""
    T, start = 50, np.full((1, 1, 1), 0.7)
    net = Recurrent("rnn_relu", 1, 1, bias=False, dtype="float64")
    net.params["weight_ih_l0"] = np.zeros((1, 1))

    def run(w):
        net.params["weight_hh_l0"] = np.full((1, 1), w)
        trace = net.forward(np.zeros((T, 1, 1)), start)
        return trace, net.backward(trace, np.zeros((T, 1, 1)), np.ones((1, 1, 1)))

    def slope(w):
        return run(w)[1].params["weight_hh_l0"][0, 0]

    rounding = 2 * T * np.finfo(float).eps  # one rounding of each of T products, forwards and backwards
    for w in (0.5, 0.9, 1.0, 1.1, 2.0):
        trace, gradients = run(w)
        assert trace.final[0, 0, 0] == pytest.approx(0.7 * w**T, rel=rounding, abs=0)
        assert slope(w) == pytest.approx(0.7 * T * w ** (T - 1), rel=rounding, abs=0)
        np.testing.assert_allclose(gradients.h[0][:, 0, 0], w ** np.arange(T, -1.0, -1), rtol=rounding)
        step = 1e-5 * w
        second = (slope(w + step) - slope(w - step)) / (2 * step)
        # The relative truncation (step/w)² T²/6 is 4e-8.
        assert second == pytest.approx(0.7 * T * (T - 1) * w ** (T - 2), rel=1e-7, abs=0)


@pytest.mark.parametrize("gain", [0.5, 0.9, 1.0, 1.25])
def test_orthogonal_linear_keeps_norm_ratio(gain):
    """W = g·Q and slope 1, tanh at rest: every step back multiplies the norm by g."""
    T, H = 200, 37
    net = Recurrent("rnn_tanh", 1, H, dtype="float64")
    net.initialise("orthogonal", "zeros", "zeros", gain=gain, seed=9)
    trace = net.forward(np.zeros((T, 1, 1)))
    d_output = np.zeros((T, 1, H))
    d_output[-1] = np.random.default_rng(10).normal(size=H)
    norms = np.linalg.norm(net.backward(trace, d_output).h[0][:, 0], axis=1)
    np.testing.assert_allclose(norms[:-1] / norms[1:], gain, rtol=H * np.finfo(float).eps)  # a sum of H products
    assert norms[0] / norms[-1] == pytest.approx(gain**T, rel=T * H * np.finfo(float).eps, abs=0)


def norms_at_rest(weight, T, d_final):
    """The norms of dL/dh_t of a tanh network at rest, whose Jacobian is `weight`, from the initial state on."""
    H = len(weight)
    net = Recurrent("rnn_tanh", 1, H, bias=False, dtype="float64")
    net.params["weight_hh_l0"] = weight
    trace = net.forward(np.zeros((T, 1, 1)))
    gradients = net.backward(trace, np.zeros((T, 1, H)), d_final[None, None])
    return np.linalg.norm(gradients.h[0][:, 0], axis=1)


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("cell", "gamma"), [("rnn_tanh", 1), ("rnn_sigmoid", 1 / 4)])
def test_pascanu_bound(cell, gamma, scale):
    """‖δ_k‖ ≤ (γ σ_max(W))ᵗ⁻ᵏ ‖δ_t‖, γ the largest slope: Pascanu, Mikolov & Bengio (2013), eq. 6–7."""
    T, B, H = 30, 5, 20
    net, _ = random_network(cell, 3, H, scale=scale, seed=11)
    rng = np.random.default_rng(12)
    trace = net.forward(rng.normal(size=(T, B, 3)))
    d_output = np.zeros((T, B, H))
    d_output[-1] = rng.normal(size=(B, H))
    norms = np.linalg.norm(net.backward(trace, d_output).h[0], axis=2)
    bound = gamma * np.linalg.norm(net.params["weight_hh_l0"], 2)
    for k in range(T):
        lags = np.arange(1, T + 1 - k)[:, None]
        assert (norms[k] <= bound**lags * norms[k + 1 :] * (1 + 1e-12)).all()  # roundings of the norms


def test_pascanu_bound_takes_the_singular_value():
    """A non-normal W with spectral radius ½ and σ_max 10: the norm first grows, within σ_max; ρ is no bound."""
    weight, T = np.array([[0.5, 10.0], [0.0, 0.5]]), 12
    norms = norms_at_rest(weight, T, np.array([1.0, 0.0]))
    lags = np.arange(T, -1, -1)
    # Wⁿ = ½ⁿ (1, 20 n; 0, 1), whose first row is δ_{T−n}.
    np.testing.assert_allclose(norms, 0.5**lags * np.sqrt(1 + (20.0 * lags) ** 2), rtol=TOLERANCE)
    assert (norms <= np.linalg.norm(weight, 2) ** lags * (1 + 1e-12)).all()
    assert norms[T - 1] > 20 * 0.5 * norms[T]


@pytest.mark.parametrize(("bias", "rate"), [(0, -0.693147), (1, -0.313262), (2, -0.126928), (5, -0.00671535)])
def test_lstm_without_weights_decays_with_forget_gate(bias, rate):
    """With all weights zero dL/dc shrinks by σ(b_f) a step: 1.44, 3.19, 7.88 and 149 steps to 1/e."""
    T, H = 100, 4
    net = Recurrent("lstm", 2, H, dtype="float64")
    net.initialise("zeros", "zeros", "zeros", forget_bias=bias)
    trace = net.forward(np.zeros((T, 1, 2)))
    nothing, d_final = np.zeros((T, 1, H)), (np.zeros((1, 1, H)), np.ones((1, 1, H)))
    dc = net.backward(trace, nothing, d_final).c[0][:, 0]
    np.testing.assert_allclose(
        np.diff(np.log(dc), axis=0), -np.log(naive.sigmoid(bias)), rtol=1e-11
    )  # 2 ulp of dc / rate
    assert np.log(dc[0]).mean() / T == pytest.approx(rate, rel=1e-5)  # the digits given


def test_lstm_without_recurrence_decays_with_forget_gate():
    """With W_hh = 0 and driven gates the decay of dL/dc is Σ_t ln σ(a_f(t)), unit by unit."""
    T, B, H = 300, 3, 6
    net, params = random_network("lstm", 2, H, seed=13)
    net.params["weight_hh_l0"] = params["weight_hh_l0"] = np.zeros((4 * H, H))
    rng = np.random.default_rng(14)
    x = rng.normal(size=(T, B, 2))
    trace = net.forward(x)
    d_final = np.zeros((1, B, H)), rng.uniform(1, 2, (1, B, H))
    dc = net.backward(trace, np.zeros((T, B, H)), d_final).c[0]
    forget = slice(H, 2 * H)
    weight, biases = params["weight_ih_l0"][forget], params["bias_ih_l0"] + params["bias_hh_l0"]
    log_f = np.log(naive.sigmoid(x @ weight.T + biases[forget]))
    np.testing.assert_allclose(np.log(dc[0] / dc[T]) / T, log_f.mean(axis=0), rtol=TOLERANCE)


def test_constant_error_carousel():
    """lstm_no_forget without W_hh: whatever drives the gates, dc_t = dc_T to the last bit, scaled or not."""
    T, B, H = 100, 3, 6
    net, _ = random_network("lstm_no_forget", 2, H, seed=15)
    net.params["weight_hh_l0"] = np.zeros((3 * H, H))
    rng = np.random.default_rng(16)
    trace = net.forward(rng.normal(size=(T, B, 2)), random_state(rng, net, B))
    nothing, d_final = np.zeros((T, B, H)), (np.zeros((1, B, H)), rng.normal(size=(1, B, H)))
    gradients = net.backward(trace, nothing, d_final)
    np.testing.assert_array_equal(gradients.c[0], np.broadcast_to(d_final[1], (T + 1, B, H)))
    np.testing.assert_array_equal(gradients.state[1], d_final[1])
    (layer,), _, _ = net.backpropagate(trace, nothing, d_final, scaled=True)
    np.testing.assert_array_equal(np.ldexp(layer.state[1], layer.exponent[:, :, None]), gradients.c[0])


# Invariances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_cut_sequence_with_carried_state(cell):
    """Two halves, the state carried forwards and its gradient backwards, are the whole."""
    T, cut, B = 9, 4, 3
    net, _ = random_network(cell, 3, 6, 2, seed=17)
    rng = np.random.default_rng(18)
    x, state, d_final = rng.normal(size=(T, B, 3)), random_state(rng, net, B), random_state(rng, net, B)
    trace = net.forward(x, state)
    d_output = rng.normal(size=trace.output.shape)
    whole = net.backward(trace, d_output, d_final)
    first = net.forward(x[:cut], state)
    second = net.forward(x[cut:], first.final)
    assert relative_error(np.concatenate([first.output, second.output]), trace.output) <= TOLERANCE
    late = net.backward(second, d_output[cut:], d_final)
    early = net.backward(first, d_output[:cut], late.state)
    assert relative_error(np.concatenate([early.x, late.x]), whole.x) <= TOLERANCE
    for name in whole.params:
        assert relative_error(early.params[name] + late.params[name], whole.params[name]) <= TOLERANCE
    for one, other, both in zip(early.h + early.c, late.h + late.c, whole.h + whole.c, strict=True):
        # In the slot that both share only the early part counts the output of its last step.
        assert relative_error(np.concatenate([one, other[1:]]), both) <= TOLERANCE


@pytest.mark.parametrize("cell", CELLS)
def test_batch_permutation(cell):
    """Sequences do not see each other: another order gives the same numbers in that order."""
    T, B, H = 6, 5, 7
    lengths, order = np.array([6, 2, 5, 1, 3]), np.array([3, 0, 4, 1, 2])
    net, _ = random_network(cell, 3, H, 2, bidirectional=True, seed=19)
    rng = np.random.default_rng(20)
    x, state, d_final = rng.normal(size=(T, B, 3)), random_state(rng, net, B), random_state(rng, net, B)
    d_output = rng.normal(size=(T, B, 2 * H))
    trace = net.forward(x, state, lengths)
    gradients = net.backward(trace, d_output, d_final)

    def permuted(old):
        return as_state(part[:, order] for part in parts_of(old))

    other = net.forward(x[:, order], permuted(state), lengths[order])
    back = net.backward(other, d_output[:, order], permuted(d_final))
    assert relative_error(other.output, trace.output[:, order]) <= TOLERANCE
    assert relative_error(other.final, permuted(trace.final)) <= TOLERANCE
    assert relative_error(back.x, gradients.x[:, order]) <= TOLERANCE
    assert relative_error(back.state, permuted(gradients.state)) <= TOLERANCE
    for name in gradients.params:
        assert relative_error(back.params[name], gradients.params[name]) <= TOLERANCE


@pytest.mark.parametrize("padding", [0.0, 1e300, np.nan, np.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_changes_nothing(cell, padding):
    """Each sequence alone gives what it gives beside longer ones, whatever x holds past its end, and d_output too."""
    T, H, lengths = 6, 5, np.array([4, 1, 6])
    net, _ = random_network(cell, 3, H, 2, bidirectional=True, seed=21)
    rng = np.random.default_rng(22)
    x, state, d_final = rng.normal(size=(T, 3, 3)), random_state(rng, net, 3), random_state(rng, net, 3)
    d_output = rng.normal(size=(T, 3, 2 * H))
    past = np.arange(T)[:, None] >= lengths
    trace = net.forward(np.where(past[:, :, None], padding, x), state, lengths)
    gradients = net.backward(trace, np.where(past[:, :, None], 1e9, d_output), d_final)
    summed = net.params.like()
    for b, length in enumerate(lengths):

        def alone(old, b=b):
            return as_state(part[:, b : b + 1] for part in parts_of(old))

        single = net.forward(x[:length, b : b + 1], alone(state))
        back = net.backward(single, d_output[:length, b : b + 1], alone(d_final))
        summed.flat += back.params.flat
        assert relative_error(trace.output[:length, b : b + 1], single.output) <= TOLERANCE
        assert relative_error(alone(trace.final), single.final) <= TOLERANCE
        assert relative_error(gradients.x[:length, b : b + 1], back.x) <= TOLERANCE
        assert relative_error(alone(gradients.state), back.state) <= TOLERANCE
        assert (trace.output[length:, b] == 0).all()
        assert (gradients.x[length:, b] == 0).all()
    for name in summed:
        assert relative_error(gradients.params[name], summed[name]) <= TOLERANCE
