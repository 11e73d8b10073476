"""What mathematics predicts of gradients, to be drawn beside what is measured: rates in nats per step.

Mean field: W_hh,ij ~ N(0, g²/N) with N → ∞, so that what units receive is Gaussian. Such a population averages itself:
‖dL/dh_t‖² goes as χ^lag in every network, and ½ ln χ is the rate of the mean square and of the typical log-norm alike.
At finite N the log-norm is lower, by half the variance of its steps: of order 1/N a step.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import gammaln, log_expit, logsumexp, xlogy

from .checks import check_array, check_choice, check_integer, check_number
from .kernels import Array, Floats
from .rnn import Recurrent

__all__ = ["forget_gate_rate", "gate_exponents", "linear_exponents", "resting_gradient", "resting_rate"]
__all__ += ["singular_value_bound", "tanh_gradient", "tanh_mean_exponent", "tanh_rate", "tanh_variance"]

#: Cells with a gate that keeps the state and looks at nothing but x and h.
_KEEPING = ("lstm", "lstm_coupled", "gru", "gru_reset_before")


# Closed forms -------------------------------------------------------------------------------------------------------


def forget_gate_rate(forget_bias: ArrayLike) -> Any:
    """Return the decay of dL/dc along an LSTM's cell state with W = 0: ln σ(b_f), nats per step.

    ∂c_t/∂c_{t−1} = f_t (Gers, Schmidhuber & Cummins 2000), and f_t = σ(b_f) where nothing else reaches the gate. An
    array of biases or pre-activations gives an array.
    """
    return log_expit(np.asarray(forget_bias, np.float64))


def gate_exponents(net: Recurrent, x: Array) -> Floats:
    """Return the exponents (S·H,) that one layer driven by x (T, 1, I) would have with W_hh = 0, descending.

    ⟨ln f_t⟩ for each unit of an LSTM, ⟨ln z_t⟩ of a GRU with h' = (1 − z)∘n + z∘h; −∞ for every h of an LSTM, which
    then only reads c. Raises ValueError for a cell without such a gate, several layers and several sequences.
    """
    check_choice("the cell of net", net.cell.name, _KEEPING)
    if net.num_layers * net.directions > 1:
        raise ValueError(f"net must have one layer in one direction, got {net!r}")
    x = check_array("x", x, ("T", 1, net.input_size), net.dtype)
    weights, gate = net.weights(0), next(k for k, name in enumerate(net.cell.gates) if name in "fz")
    rows = slice(gate * net.hidden_size, (gate + 1) * net.hidden_size)
    field = x[:, 0] @ weights.weight_ih[rows].T + (weights.bias_ih + weights.bias_hh)[rows]
    kept = np.sort(forget_gate_rate(field).mean(axis=0))[::-1]
    return np.concatenate([kept, np.full((len(net.cell.states) - 1) * net.hidden_size, -np.inf)])


def linear_exponents(weight: ArrayLike) -> Floats:
    """Return the exponents of h' = W h for a fixed W, descending: ln |μ_i| of its eigenvalues; ln g where W = g·Q.

    Raises ValueError for a weight that is not square or not finite.
    """
    matrix = _matrix(weight)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"weight must be square, got shape {matrix.shape}")
    with np.errstate(divide="ignore"):
        exponents: Floats = np.sort(np.log(np.abs(np.linalg.eigvals(matrix))))[::-1]
    return exponents


def singular_value_bound(weight: ArrayLike, slope: float = 1.0) -> float:
    """Return ln(γ σ_max(W)), which the log-norm of dL/dh_t of an RNN rises by per step of lag at most.

    γ bounds the slope of its nonlinearity: 1 for tanh and relu, ¼ for sigmoid (Pascanu, Mikolov & Bengio 2013).
    The largest singular value bounds; the spectral radius does not. Raises ValueError for a weight that is not a
    finite matrix, and a negative or infinite slope.
    """
    return _log(check_number("slope", slope, 0, math.inf) * float(np.linalg.norm(_matrix(weight), 2)))


def _matrix(weight: ArrayLike) -> Floats:
    return check_array("weight", np.asarray(weight, np.float64), ("rows", "columns"), np.dtype(np.float64))


# Mean field of the tanh RNN -----------------------------------------------------------------------------------------


def tanh_variance(gain: float, input_variance: float = 0.0) -> float:
    """Return the variance q = g² E tanh²(√q z) + v of what a unit receives, recurrent and input, in the steady state.

    h_t = tanh(W_hh h_{t−1} + u_t) with u_t ~ N(0, v), independent from unit to unit and from step to step (Molgedey,
    Schuchhardt & Schuster 1992); v = 0 is the autonomous network of Sompolinsky, Crisanti & Sommers (1988), of whose
    solutions this is the chaotic one where there is one, g > 1. Raises ValueError for negative or infinite arguments.
    """
    g2 = check_number("gain", gain, 0, math.inf) ** 2
    v = check_number("input_variance", input_variance, 0, math.inf)
    if v == 0 and g2 <= 1:
        return 0.0
    # E tanh² ≥ q − 2q², so that with v = 0 the map lies above q up to half of 1 − 1/g².
    low = v if v > 0 else 0.25 * (1 - 1 / g2)
    above, real = lambda q: g2 * _mean(lambda a: np.tanh(a) ** 2, q) + v - q, np.finfo(np.float64)
    return float(brentq(above, low, g2 + v, xtol=real.tiny, rtol=4 * real.eps))


def tanh_rate(gain: float, input_variance: float = 0.0) -> float:
    """Return ½ ln χ, χ = g² E tanh'²(√q z), of the random tanh RNN of `tanh_variance`, in nats per step.

    Both the largest Lyapunov exponent and, with the sign of growth per step of lag, the rate of ‖dL/dh_t‖ (Schoenholz
    et al. 2017, for deep networks). Raises as `tanh_variance`.
    """
    slope = _mean(lambda a: (1 - np.tanh(a) ** 2) ** 2, tanh_variance(gain, input_variance))
    return _log(gain) + 0.5 * _log(slope)


def tanh_mean_exponent(gain: float, input_variance: float = 0.0) -> float:
    """Return the mean of all Lyapunov exponents, ln g − ½ + E ln tanh'(√q z), of the network of `tanh_variance`.

    Their sum is ⟨ln |det J|⟩, and (1/N) ln |det W| → ln g − ½ (Girko's circular law). Raises as `tanh_variance`.
    """
    # ln tanh' = −2 ln cosh: 1 − tanh² would cancel.
    slope = _mean(lambda a: 2 * (math.log(2) - np.logaddexp(a, -a)), tanh_variance(gain, input_variance))
    return _log(gain) - 0.5 + slope


def tanh_gradient(gain: float, fields: Floats, mean_square: float = 0.0) -> Floats:
    """Return ln ‖dL/dh_t‖ − ln ‖dL/dh_T‖ (T+1,) of a tanh RNN driven by any one sequence, loss at its last step.

    fields (T, N): W_ih x_t + b_ih + b_hh, what every unit receives at every step besides W_hh h_{t−1}; mean_square: of
    h_0. χ_t = g² ⟨tanh'²⟩ over Gaussian recurrent fields, of the variance that the step before leaves, and over the
    units: also inputs that are shared by all units or correlated in time, and transients. W_hh may be gaussian or,
    g·Q, orthogonal. Raises ValueError for a negative gain or mean_square, and fields that are not finite.
    """
    g2, growth = check_number("gain", gain, 0, math.inf) ** 2, []
    mean_square = check_number("mean_square", mean_square, 0, math.inf)
    for field in check_array("fields", np.asarray(fields, np.float64), ("T", "N"), np.dtype(np.float64)):
        slope = _mean(lambda a: (1 - np.tanh(a) ** 2) ** 2, g2 * mean_square, field)
        mean_square = _mean(lambda a: np.tanh(a) ** 2, g2 * mean_square, field)
        growth.append(0.5 * _log(g2 * slope))
    return np.concatenate([np.cumsum(growth[::-1])[::-1], [0.0]])


# Gated cells at rest ------------------------------------------------------------------------------------------------


def resting_rate(cell: str, gain: float, forget_bias: float = 0.0) -> float:
    """Return ln ρ(J) of a random network at rest, h = c = 0 without input: the rate of long lags, nats per step.

    J = a + b·W, the eigenvalues of W (W_hh,g of an LSTM, W_hh,n of a GRU; gaussian or, g·Q, orthogonal) in a disc of
    radius g: ρ = a + b·g, with a = σ(forget_bias) of f or z and b what h adds to the new state, ¼ for an LSTM and
    ½·(1 − a) for a GRU or a coupled LSTM. No other bias (Can, Krishnamurthy & Schwab 2020). Weak inputs change it
    little; above 0 the network does not stay at rest. Raises ValueError for a cell that is none of rnn_tanh, lstm,
    lstm_coupled, gru, gru_reset_before; rnn_tanh has no gate and ignores `forget_bias`.
    """
    keep, through = _at_rest(cell, gain, forget_bias)
    return _log(keep + through)


def resting_gradient(cell: str, gain: float, lags: int, forget_bias: float = 0.0) -> Floats:
    """Return ln ‖δ_lag‖ − ln ‖δ_0‖ (lags+1,) at rest, of δ = dL/dc_t of an LSTM, dL/dh_t else; as `resting_rate`.

    ‖(a + b W)^k v‖² = Σ_j C(k, j)² a^(2k−2j) (b g)^(2j) ‖v‖², as W^i v and W^j v are orthogonal for a random W. With
    weights drawn anew at every step it would be (a² + b² g²)^k: such theories decay too fast for a recurrent network.
    A gaussian W of N units departs from it after about √N lags, when its own largest eigenvalues take over.
    """
    keep, through = _at_rest(cell, gain, forget_bias)
    k = np.arange(check_integer("lags", lags) + 1)[:, None]
    j = np.arange(lags + 1)
    with np.errstate(invalid="ignore"):
        terms = gammaln(k + 1) - gammaln(j + 1) - gammaln(k - j + 1) + xlogy(k - j, keep) + xlogy(j, through)
    curve: Floats = 0.5 * logsumexp(np.where(j <= k, 2 * terms, -np.inf), axis=1)
    return curve


def _at_rest(cell: str, gain: float, forget_bias: float) -> tuple[float, float]:
    """Return a and b·g of J = a + b·W."""
    check_choice("cell", cell, ("rnn_tanh", *_KEEPING))
    radius = check_number("gain", gain, 0, math.inf)
    bias = check_number("forget_bias", forget_bias, -math.inf, math.inf)
    if cell == "rnn_tanh":
        return 0.0, radius
    keep, lose = (math.exp(forget_gate_rate(sign * bias)) for sign in (1, -1))
    return keep, radius * (0.25 if cell == "lstm" else 0.5 * lose)


# Gaussian means -----------------------------------------------------------------------------------------------------


def _mean(function: Callable[[Floats], Floats], variance: float, means: Floats | float = 0.0) -> float:
    """Return E function(m + √variance·z), z ~ N(0, 1), averaged over the means m, to about 1e-15.

    The trapezoidal rule converges as e^(−2πd/step) for what is analytic at |Im z| < d, and tanh(√variance·z) is with
    d = (π/2)/√variance: e^−39 here. Beyond |z| = 9 lies 2e-19 of the weight.
    """
    step = 0.25 / max(1.0, math.sqrt(variance))
    z: Floats = step * np.arange(-math.ceil(9 / step), math.ceil(9 / step) + 1.0)
    weights: Floats = np.exp(-0.5 * z**2)
    weights /= weights.sum()
    return float((function(np.reshape(means, (-1, 1)) + math.sqrt(variance) * z) @ weights).mean())


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
