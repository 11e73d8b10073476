"""The equations: every recurrent cell as a pair of scalar functions, and the table `CELLS`.

All cells are one picture: two affine maps, then an elementwise function of one hidden unit,

    ax = W_ih x_t + b_ih,    ah = W_hh h_{t−1} + b_hh        one number a gate and unit
    state_t = step(ax, ah, state_{t−1})                      one unit at a time

For one unit, `ax` and `ah` are tuples with one number a gate, `state` is `(h,)` or `(h, c)`, and `peephole` holds the
unit's own weights on its cell state (empty for all cells but one).

- `step(ax, ah, peephole, state)` returns the new state and `saved`: the local partial derivatives, already multiplied
  out, each named after what it differentiates (`c_i` is ∂c_t/∂a_i, with a_i the pre-activation of gate i).
- `step_backward(saved, peephole, d_state)` takes dL/dstate_t, as later steps and the output give it, and returns
  dL/dax, dL/dah, dL/dpeephole, the total dL/dstate_t (to which c_t adds what it does to h_t), and the part of
  dL/dstate_{t−1} that does not pass through W_hh. It is linear in `d_state`: unit cotangents give the Jacobian.

Every LSTM ends in the same h_t = o_t ∘ tanh(c_t), which stands once, as `_output`: their `step` returns o in the place
of h, and o's slope first among `saved`. A processor overlaps more units where a loop takes each of both.

Everything else (kernels, Jacobians, tests, studies, benchmarks) is built from these pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .activations import relu, scalar, sigmoid, tanh

__all__ = ["CELLS", "Cell"]


def _rnn(activation):
    """h_t = f(ax + ah): Elman (1990)."""

    @scalar
    def step(ax, ah, peephole, state):
        h, slope = activation(ax[0] + ah[0])
        return (h,), (slope,)

    @scalar
    def step_backward(saved, peephole, d_state):
        da = (d_state[0] * saved[0],)
        return da, da, (), d_state, (type(d_state[0])(0),)

    return step, step_backward


@scalar
def _output(o, o_slope, c):
    """The output of every LSTM, h_t = o_t ∘ tanh(c_t), with ∂h_t/∂a_o and ∂h_t/∂c_t."""
    tanh_c, tanh_c_slope = tanh(c)
    return o * tanh_c, (tanh_c * o_slope, o * tanh_c_slope)


@scalar
def _lstm(ax, ah, peephole, state):
    """Hochreiter & Schmidhuber (1997) with the forget gate of Gers, Schmidhuber & Cummins (2000)."""
    _, c_old = state
    i, i_slope = sigmoid(ax[0] + ah[0])
    f, f_slope = sigmoid(ax[1] + ah[1])
    g, g_slope = tanh(ax[2] + ah[2])
    o, o_slope = sigmoid(ax[3] + ah[3])
    c = f * c_old + i * g
    return (o, c), (o_slope, g * i_slope, c_old * f_slope, i * g_slope, f)


@scalar
def _lstm_backward(saved, peephole, d_state):
    h_o, h_c, c_i, c_f, c_g, f = saved
    dh, dc = d_state
    dc += dh * h_c
    da = (dc * c_i, dc * c_f, dc * c_g, dh * h_o)
    return da, da, (), (dh, dc), (type(dh)(0), dc * f)


@scalar
def _lstm_no_forget(ax, ah, peephole, state):
    """Hochreiter & Schmidhuber (1997): no forget gate, so that dc_t/dc_{t−1} = 1, the constant error carousel."""
    _, c_old = state
    i, i_slope = sigmoid(ax[0] + ah[0])
    g, g_slope = tanh(ax[1] + ah[1])
    o, o_slope = sigmoid(ax[2] + ah[2])
    c = c_old + i * g
    return (o, c), (o_slope, g * i_slope, i * g_slope)


@scalar
def _lstm_no_forget_backward(saved, peephole, d_state):
    h_o, h_c, c_i, c_g = saved
    dh, dc = d_state
    dc += dh * h_c
    da = (dc * c_i, dc * c_g, dh * h_o)
    return da, da, (), (dh, dc), (type(dh)(0), dc)


@scalar
def _lstm_peephole(ax, ah, peephole, state):
    """Gers, Schraudolph & Schmidhuber (2002): i and f look at c_{t−1}, o at c_t, each unit at its own c."""
    _, c_old = state
    i, i_slope = sigmoid(ax[0] + ah[0] + peephole[0] * c_old)
    f, f_slope = sigmoid(ax[1] + ah[1] + peephole[1] * c_old)
    g, g_slope = tanh(ax[2] + ah[2])
    c = f * c_old + i * g
    o, o_slope = sigmoid(ax[3] + ah[3] + peephole[2] * c)
    return (o, c), (o_slope, g * i_slope, c_old * f_slope, i * g_slope, f, c_old, c)


@scalar
def _lstm_peephole_backward(saved, peephole, d_state):
    h_o, h_c, c_i, c_f, c_g, f, c_old, c = saved
    dh, dc = d_state
    do = dh * h_o
    dc += dh * h_c + do * peephole[2]
    di, df, dg = dc * c_i, dc * c_f, dc * c_g
    da = (di, df, dg, do)
    dc_old = dc * f + di * peephole[0] + df * peephole[1]
    return da, da, (di * c_old, df * c_old, do * c), (dh, dc), (type(dh)(0), dc_old)


@scalar
def _lstm_coupled(ax, ah, peephole, state):
    """The input gate coupled to the forget gate, i = 1 − f: CIFG of Greff et al. (2017), sec. 3."""
    _, c_old = state
    f, f_slope = sigmoid(ax[0] + ah[0])
    i, _ = sigmoid(-(ax[0] + ah[0]))  # 1 − f without cancellation, from the same exponential
    g, g_slope = tanh(ax[1] + ah[1])
    o, o_slope = sigmoid(ax[2] + ah[2])
    c = f * c_old + i * g
    return (o, c), (o_slope, (c_old - g) * f_slope, i * g_slope, f)


@scalar
def _lstm_coupled_backward(saved, peephole, d_state):
    h_o, h_c, c_f, c_g, f = saved
    dh, dc = d_state
    dc += dh * h_c
    da = (dc * c_f, dc * c_g, dh * h_o)
    return da, da, (), (dh, dc), (type(dh)(0), dc * f)


@scalar
def _gru(ax, ah, peephole, state):
    """Cho et al. (2014), resetting after the product: n = tanh(ax_n + r ∘ ah_n), as PyTorch and cuDNN do."""
    h_old = state[0]
    r, r_slope = sigmoid(ax[0] + ah[0])
    z, z_slope = sigmoid(ax[1] + ah[1])
    update, _ = sigmoid(-(ax[1] + ah[1]))  # 1 − z without cancellation, from the same exponential
    n, n_slope = tanh(ax[2] + r * ah[2])
    return (update * n + z * h_old,), (ah[2] * r_slope, (h_old - n) * z_slope, update * n_slope, r, z)


@scalar
def _gru_backward(saved, peephole, d_state):
    n_r, h_z, h_n, r, z = saved
    dh = d_state[0]
    dn = dh * h_n
    dr, dz = dn * n_r, dh * h_z
    return (dr, dz, dn), (dr, dz, dn * r), (), d_state, (dh * z,)


@scalar
def _reset(ax_r, ah_r, h_old):
    """Phase one of `gru_reset_before`: return r ∘ h_{t−1}, which W_hn then multiplies, and what its backward needs."""
    r, r_slope = sigmoid(ax_r + ah_r)
    return r * h_old, (r, h_old * r_slope)


@scalar
def _reset_backward(saved, d_reset):
    """Take dL/d(r ∘ h_{t−1}); return dL/da_r and that path's part of dL/dh_{t−1}."""
    r, reset_r = saved
    return d_reset * reset_r, d_reset * r


@scalar
def _gru_reset_before(ax, ah, peephole, state):
    """Cho et al. (2014), eq. 5–8: phase two, where ah[2] = W_hn (r ∘ h_{t−1}) + b_hn already holds the reset."""
    h_old = state[0]
    z, z_slope = sigmoid(ax[1] + ah[1])
    update, _ = sigmoid(-(ax[1] + ah[1]))
    n, n_slope = tanh(ax[2] + ah[2])
    return (update * n + z * h_old,), ((h_old - n) * z_slope, update * n_slope, z)


@scalar
def _gru_reset_before_backward(saved, peephole, d_state):
    h_z, h_n, z = saved
    dh = d_state[0]
    da = (type(dh)(0), dh * h_z, dh * h_n)  # gate r receives its share in phase one
    return da, da, (), d_state, (dh * z,)


def _followed(step, output):
    @scalar
    def whole_step(ax, ah, peephole, state):
        (o, c), saved = step(ax, ah, peephole, state)
        h, partials = output(o, saved[0], c)
        return (h, c), partials + saved[1:]

    return whole_step


@dataclass(frozen=True)
class Cell:
    """One row of `CELLS`: what a kernel needs to know of a cell.

    `gates` and `states` name the blocks in their order in weights and state; `saved` counts what a step saves;
    `peepholes` names the gates that look at the cell state; `joint` says that ax and ah enter only as their sum, so
    that dL/dax is dL/dah; `reset` is the pair of functions of a first phase, whose product W_hn (r ∘ h) comes second;
    `output(o, o_slope, c)` returns h and two more numbers that are saved, for a `step` that leaves both to it.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: int
    step: Callable[..., Any]
    step_backward: Callable[..., Any]
    peepholes: tuple[str, ...] = ()
    joint: bool = True
    reset: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    output: Callable[..., Any] | None = None

    @cached_property
    def whole_step(self) -> Callable[..., Any]:
        """`step`, and `output` after it."""
        return self.step if self.output is None else _followed(self.step, self.output)

    def __hash__(self) -> int:
        return hash(self.name)


CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", ("h",), ("h",), 1, *_rnn(tanh)),
        Cell("rnn_relu", ("h",), ("h",), 1, *_rnn(relu)),
        Cell("rnn_sigmoid", ("h",), ("h",), 1, *_rnn(sigmoid)),
        Cell("lstm", ("i", "f", "g", "o"), ("h", "c"), 6, _lstm, _lstm_backward, output=_output),
        Cell(
            "lstm_no_forget", ("i", "g", "o"), ("h", "c"), 4, _lstm_no_forget, _lstm_no_forget_backward, output=_output
        ),
        Cell(
            "lstm_peephole",
            ("i", "f", "g", "o"),
            ("h", "c"),
            8,
            _lstm_peephole,
            _lstm_peephole_backward,
            peepholes=("i", "f", "o"),
            output=_output,
        ),
        Cell("lstm_coupled", ("f", "g", "o"), ("h", "c"), 5, _lstm_coupled, _lstm_coupled_backward, output=_output),
        Cell("gru", ("r", "z", "n"), ("h",), 5, _gru, _gru_backward, joint=False),
        Cell(
            "gru_reset_before",
            ("r", "z", "n"),
            ("h",),
            3,
            _gru_reset_before,
            _gru_reset_before_backward,
            reset=(_reset, _reset_backward),
        ),
    )
}
