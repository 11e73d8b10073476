"""The textbook in float64 NumPy: every cell, forward and backward through time, one step after the other.

The oracle that the kernels are held to. It imports nothing of rnnlab, and is written to be read, not to be fast.

T steps, B sequences, I inputs, H hidden units, G gate blocks, L layers, D directions, S parts of the state (h, or h
and c). A layer-direction is k = layer·D + direction, direction 1 being the reverse one.

    x (T, B, I)    weight_ih (G·H, I or, above layer 0, D·H)    weight_hh (G·H, H)    bias_ih, bias_hh (G·H,)
    peephole (3·H,): i, f, o    at one step: x (B, I), h, c (B, H), over the sequences that have not ended

A prefix a- is a pre-activation, d- the derivative of the loss; `_new` is the state after the step. Each cell has a
`step`, which returns the new state and what its `step_backward` needs; that one returns dx, the derivatives of the
state before the step, and those of the parameters, summed over the batch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np


def sigmoid(a):
    e = np.exp(-np.abs(a))  # at most 1: neither sign of a overflows
    return np.where(a >= 0, 1 / (1 + e), e / (1 + e))


def sigmoid_prime(a):
    return sigmoid(a) * sigmoid(-a)


def tanh_prime(a):
    e = np.exp(-np.abs(a))
    return (2 * e / (1 + e * e)) ** 2  # 1 / cosh(a)²


def relu(a):
    return np.maximum(a, 0.0)


def relu_prime(a):
    return np.where(a > 0, 1.0, 0.0)


def affine(p, side, v):
    """W v + b for a batch of rows v; `side` is "ih" or "hh", and without a bias b is zero."""
    a = v @ p[f"weight_{side}"].T
    return a + p[f"bias_{side}"] if f"bias_{side}" in p else a


def affine_backward(p, side, v, da):
    """dL/dv, and the derivatives of W and b, from da = dL/d(W v + b), its elements clipped to p["limit"]."""
    da = np.clip(da, -p.get("limit", np.inf), p.get("limit", np.inf))
    return da @ p[f"weight_{side}"], {f"weight_{side}": da.T @ v, f"bias_{side}": da.sum(axis=0)}


def maps_backward(p, x, h, dax, dah):
    """dL/dx, dL/dh and the derivatives of all weights and biases, from those of W_ih x + b_ih and W_hh h + b_hh."""
    dx, grads_ih = affine_backward(p, "ih", x, dax)
    dh, grads_hh = affine_backward(p, "hh", h, dah)
    return dx, dh, grads_ih | grads_hh


def blocks(a, gates):
    return np.split(a, gates, axis=-1)


def join(*parts):
    return np.concatenate(parts, axis=-1)


# Elman 1990, doi:10.1207/s15516709cog1402_1: h' = f(a)
def rnn_step(f, p, x, h):
    a = affine(p, "ih", x) + affine(p, "hh", h)
    return (f(a),), (x, h, a)


def rnn_step_backward(f_prime, p, x, h, a, dh_new):
    da = dh_new * f_prime(a)
    dx, dh, grads = maps_backward(p, x, h, da, da)
    return dx, (dh,), (dh_new,), grads


# Gers, Schmidhuber & Cummins 2000, doi:10.1162/089976600300015015: c' = f∘c + i∘g, h' = o∘tanh(c')
def lstm_step(p, x, h, c):
    a_i, a_f, a_g, a_o = blocks(affine(p, "ih", x) + affine(p, "hh", h), 4)
    c_new = sigmoid(a_f) * c + sigmoid(a_i) * np.tanh(a_g)
    h_new = sigmoid(a_o) * np.tanh(c_new)
    return (h_new, c_new), (x, h, c, a_i, a_f, a_g, a_o, c_new)


def lstm_step_backward(p, x, h, c, a_i, a_f, a_g, a_o, c_new, dh_new, dc_new):
    da_o = dh_new * np.tanh(c_new) * sigmoid_prime(a_o)
    dc_all = dc_new + dh_new * sigmoid(a_o) * tanh_prime(c_new)  # c' itself, and c' through h'
    da_i = dc_all * np.tanh(a_g) * sigmoid_prime(a_i)
    da_f = dc_all * c * sigmoid_prime(a_f)
    da_g = dc_all * sigmoid(a_i) * tanh_prime(a_g)
    dc = dc_all * sigmoid(a_f)
    da = join(da_i, da_f, da_g, da_o)
    dx, dh, grads = maps_backward(p, x, h, da, da)
    return dx, (dh, dc), (dh_new, dc_all), grads


# Hochreiter & Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735, the constant error carousel: c' = c + i∘g
def lstm_no_forget_step(p, x, h, c):
    a_i, a_g, a_o = blocks(affine(p, "ih", x) + affine(p, "hh", h), 3)
    c_new = c + sigmoid(a_i) * np.tanh(a_g)
    h_new = sigmoid(a_o) * np.tanh(c_new)
    return (h_new, c_new), (x, h, a_i, a_g, a_o, c_new)


def lstm_no_forget_step_backward(p, x, h, a_i, a_g, a_o, c_new, dh_new, dc_new):
    da_o = dh_new * np.tanh(c_new) * sigmoid_prime(a_o)
    dc_all = dc_new + dh_new * sigmoid(a_o) * tanh_prime(c_new)
    da_i = dc_all * np.tanh(a_g) * sigmoid_prime(a_i)
    da_g = dc_all * sigmoid(a_i) * tanh_prime(a_g)
    dc = dc_all
    da = join(da_i, da_g, da_o)
    dx, dh, grads = maps_backward(p, x, h, da, da)
    return dx, (dh, dc), (dh_new, dc_all), grads


# Gers & Schmidhuber 2000, doi:10.1109/IJCNN.2000.861302: i and f see c, o sees c', each unit its own
def lstm_peephole_step(p, x, h, c):
    p_i, p_f, p_o = blocks(p["peephole"], 3)
    a_i, a_f, a_g, a_o = blocks(affine(p, "ih", x) + affine(p, "hh", h), 4)
    a_i = a_i + p_i * c
    a_f = a_f + p_f * c
    c_new = sigmoid(a_f) * c + sigmoid(a_i) * np.tanh(a_g)
    a_o = a_o + p_o * c_new
    h_new = sigmoid(a_o) * np.tanh(c_new)
    return (h_new, c_new), (x, h, c, a_i, a_f, a_g, a_o, c_new)


def lstm_peephole_step_backward(p, x, h, c, a_i, a_f, a_g, a_o, c_new, dh_new, dc_new):
    p_i, p_f, p_o = blocks(p["peephole"], 3)
    da_o = dh_new * np.tanh(c_new) * sigmoid_prime(a_o)
    dc_all = dc_new + dh_new * sigmoid(a_o) * tanh_prime(c_new) + da_o * p_o
    da_i = dc_all * np.tanh(a_g) * sigmoid_prime(a_i)
    da_f = dc_all * c * sigmoid_prime(a_f)
    da_g = dc_all * sigmoid(a_i) * tanh_prime(a_g)
    dc = dc_all * sigmoid(a_f) + da_i * p_i + da_f * p_f
    da = join(da_i, da_f, da_g, da_o)
    dx, dh, grads = maps_backward(p, x, h, da, da)
    d_peephole = join((da_i * c).sum(axis=0), (da_f * c).sum(axis=0), (da_o * c_new).sum(axis=0))
    return dx, (dh, dc), (dh_new, dc_all), grads | {"peephole": d_peephole}


# Greff et al. 2017, doi:10.1109/TNNLS.2016.2582924, "CIFG": c' = f∘c + (1 − f)∘g, where 1 − σ(a) = σ(−a)
def lstm_coupled_step(p, x, h, c):
    a_f, a_g, a_o = blocks(affine(p, "ih", x) + affine(p, "hh", h), 3)
    c_new = sigmoid(a_f) * c + sigmoid(-a_f) * np.tanh(a_g)
    h_new = sigmoid(a_o) * np.tanh(c_new)
    return (h_new, c_new), (x, h, c, a_f, a_g, a_o, c_new)


def lstm_coupled_step_backward(p, x, h, c, a_f, a_g, a_o, c_new, dh_new, dc_new):
    da_o = dh_new * np.tanh(c_new) * sigmoid_prime(a_o)
    dc_all = dc_new + dh_new * sigmoid(a_o) * tanh_prime(c_new)
    da_f = dc_all * (c - np.tanh(a_g)) * sigmoid_prime(a_f)
    da_g = dc_all * sigmoid(-a_f) * tanh_prime(a_g)
    dc = dc_all * sigmoid(a_f)
    da = join(da_f, da_g, da_o)
    dx, dh, grads = maps_backward(p, x, h, da, da)
    return dx, (dh, dc), (dh_new, dc_all), grads


# PyTorch's and cuDNN's GRU: n = tanh(W_in x + b_in + r∘(W_hn h + b_hn)), h' = (1 − z)∘n + z∘h
def gru_step(p, x, h):
    ax_r, ax_z, ax_n = blocks(affine(p, "ih", x), 3)
    ah_r, ah_z, ah_n = blocks(affine(p, "hh", h), 3)
    a_r = ax_r + ah_r
    a_z = ax_z + ah_z
    a_n = ax_n + sigmoid(a_r) * ah_n
    h_new = sigmoid(-a_z) * np.tanh(a_n) + sigmoid(a_z) * h
    return (h_new,), (x, h, a_r, a_z, a_n, ah_n)


def gru_step_backward(p, x, h, a_r, a_z, a_n, ah_n, dh_new):
    da_z = dh_new * (h - np.tanh(a_n)) * sigmoid_prime(a_z)
    da_n = dh_new * sigmoid(-a_z) * tanh_prime(a_n)
    da_r = da_n * ah_n * sigmoid_prime(a_r)
    dah_n = da_n * sigmoid(a_r)
    dx, dh, grads = maps_backward(p, x, h, join(da_r, da_z, da_n), join(da_r, da_z, dah_n))
    return dx, (dh + dh_new * sigmoid(a_z),), (dh_new,), grads


# Cho et al. 2014, arXiv:1406.1078, eq. 5–8: n = tanh(W_in x + b_in + W_hn (r∘h) + b_hn), the same update
def gru_reset_before_step(p, x, h):
    ax_r, ax_z, ax_n = blocks(affine(p, "ih", x), 3)
    ah_r, ah_z, _ = blocks(affine(p, "hh", h), 3)
    a_r = ax_r + ah_r
    a_z = ax_z + ah_z
    _, _, ah_n = blocks(affine(p, "hh", sigmoid(a_r) * h), 3)
    a_n = ax_n + ah_n
    h_new = sigmoid(-a_z) * np.tanh(a_n) + sigmoid(a_z) * h
    return (h_new,), (x, h, a_r, a_z, a_n)


def gru_reset_before_step_backward(p, x, h, a_r, a_z, a_n, dh_new):
    zero = np.zeros_like(h)  # W_hh meets h in its r and z blocks, r∘h in its n block: two products, each part zero
    da_z = dh_new * (h - np.tanh(a_n)) * sigmoid_prime(a_z)
    da_n = dh_new * sigmoid(-a_z) * tanh_prime(a_n)
    d_rh, grads_n = affine_backward(p, "hh", sigmoid(a_r) * h, join(zero, zero, da_n))
    da_r = d_rh * h * sigmoid_prime(a_r)
    dh, grads_rz = affine_backward(p, "hh", h, join(da_r, da_z, zero))
    dx, grads_ih = affine_backward(p, "ih", x, join(da_r, da_z, da_n))
    grads_hh = {name: grads_rz[name] + grads_n[name] for name in grads_n}
    return dx, (dh + d_rh * sigmoid(a_r) + dh_new * sigmoid(a_z),), (dh_new,), grads_ih | grads_hh


class Cell(NamedTuple):
    gates: int
    states: int  # 1: h; 2: h and c
    step: Any
    step_backward: Any


CELLS = {
    "rnn_tanh": Cell(1, 1, partial(rnn_step, np.tanh), partial(rnn_step_backward, tanh_prime)),
    "rnn_relu": Cell(1, 1, partial(rnn_step, relu), partial(rnn_step_backward, relu_prime)),
    "rnn_sigmoid": Cell(1, 1, partial(rnn_step, sigmoid), partial(rnn_step_backward, sigmoid_prime)),
    "lstm": Cell(4, 2, lstm_step, lstm_step_backward),
    "lstm_no_forget": Cell(3, 2, lstm_no_forget_step, lstm_no_forget_step_backward),
    "lstm_peephole": Cell(4, 2, lstm_peephole_step, lstm_peephole_step_backward),
    "lstm_coupled": Cell(3, 2, lstm_coupled_step, lstm_coupled_step_backward),
    "gru": Cell(3, 1, gru_step, gru_step_backward),
    "gru_reset_before": Cell(3, 1, gru_reset_before_step, gru_reset_before_step_backward),
}
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "peephole")


def suffix(k, D):
    """The end of a parameter's name in layer-direction k, such as "_l1_reverse"."""
    return f"_l{k // D}" + ("_reverse" if k % D else "")


def init_params(cell, input_size, hidden_size, num_layers, bidirectional, bias, rng, scale):
    """Every parameter drawn from N(0, scale²), biases and peepholes too: nothing is zero, nothing symmetric."""
    GH, D = CELLS[cell].gates * hidden_size, 2 if bidirectional else 1
    params = {}
    for k in range(num_layers * D):
        features = input_size if k < D else D * hidden_size
        shapes = {"weight_ih": (GH, features), "weight_hh": (GH, hidden_size)}
        if bias:
            shapes |= {"bias_ih": (GH,), "bias_hh": (GH,)}
        if cell == "lstm_peephole":
            shapes |= {"peephole": (3 * hidden_size,)}
        params |= {name + suffix(k, D): rng.normal(0.0, scale, shape) for name, shape in shapes.items()}
    return params


@dataclass
class Trace:
    """A forward pass. h, c: a list over k of (T+1, B, H), in processing order; final: h, or (h, c), of (L·D, B, H)."""

    output: np.ndarray  # (T, B, D·H)
    h: list
    c: list  # empty for a cell without c
    final: Any
    cell: str
    params: dict
    x: np.ndarray
    lengths: np.ndarray  # (B,)
    layers: int
    directions: int
    saved: list  # for each k, for each step, what step_backward needs


@dataclass
class Grads:
    """dL/d everything: `params` and `x` shaped as they are; h, c as in Trace, total derivatives; state as Trace.final.

    c[k][s] counts all that c_s does, h_s = o∘tanh(c_s) of the same slot included; a held slot makes no h of its own.
    """

    params: dict
    x: np.ndarray
    h: list
    c: list
    state: Any


def layer_params(params, k, D):
    return {name: params[name + suffix(k, D)] for name in NAMES if name + suffix(k, D) in params}


def running(lengths, s, reverse):
    """The sequences that have a step s, and the time at which each of them reads x and writes its output there."""
    rows = np.flatnonzero(s < lengths)
    times = lengths[rows] - 1 - s if reverse else np.full(len(rows), s)
    return rows, times


def stacked(state, shape):
    """A state or its derivative, h or (h, c) of (L·D, B, H), as one array (S, L·D, B, H); None is zeros."""
    if state is None:
        return np.zeros(shape)
    array = np.array(state if isinstance(state, tuple) else (state,), np.float64)
    assert array.shape == shape
    return array


def unstacked(array):
    return tuple(array) if len(array) == 2 else array[0]


def forward(cell, params, x, state=None, lengths=None, num_layers=1, bidirectional=False):
    """All layers and directions over x (T, B, I); sequence b is x[:lengths[b], b], as in PyTorch's packed sequences."""
    x = np.asarray(x, np.float64)
    params = {name: np.array(value, np.float64) for name, value in params.items()}
    (T, B, _), H, D, S = x.shape, params["weight_hh_l0"].shape[1], 2 if bidirectional else 1, CELLS[cell].states
    lengths = np.full(B, T) if lengths is None else np.array(lengths)
    assert lengths.shape == (B,)
    assert all(0 <= n <= T for n in lengths)
    states = np.zeros((S, num_layers * D, T + 1, B, H))
    states[:, :, 0] = stacked(state, (S, num_layers * D, B, H))
    saved = [[] for _ in range(num_layers * D)]
    layer_input = x
    for layer in range(num_layers):
        output = np.zeros((T, B, D * H))
        for direction in range(D):
            k = layer * D + direction
            p = layer_params(params, k, D)
            for s in range(T):
                rows, times = running(lengths, s, reverse=direction == 1)
                new, saved_s = CELLS[cell].step(p, layer_input[times, rows], *states[:, k, s, rows])
                states[:, k, s + 1] = states[:, k, s]  # held where the sequence has ended
                states[:, k, s + 1, rows] = new
                output[times, rows, direction * H : (direction + 1) * H] = new[0]
                saved[k].append(saved_s)
        layer_input = output
    h, c = list(states[0]), list(states[1]) if S == 2 else []
    return Trace(output, h, c, unstacked(states[:, :, T].copy()), cell, params, x, lengths, num_layers, D, saved)


def backward(trace, d_output, d_final=None, clip_states=np.inf, clip_gates=np.inf):
    """Backpropagation through time from d_output (T, B, D·H), read within the lengths, and d_final, as trace.final.

    Clipped on its way: the norm of each sequence's dL/d(h, c) at every step, and each element of dL/d(W v + b).
    """
    (T, B, _), H, L, D = trace.x.shape, trace.h[0].shape[2], trace.layers, trace.directions
    S = CELLS[trace.cell].states
    d_states = np.zeros((S, L * D, T + 1, B, H))
    d_states[:, :, T] = stacked(d_final, (S, L * D, B, H))
    d_params = {name: np.zeros_like(value) for name, value in trace.params.items()}
    d_layer_output = np.asarray(d_output, np.float64)
    assert d_layer_output.shape == trace.output.shape
    for layer in reversed(range(L)):
        d_layer_input = np.zeros((T, B, trace.params[f"weight_ih_l{layer}"].shape[1]))
        for direction in range(D):
            k = layer * D + direction
            p = layer_params(trace.params, k, D)
            for s in reversed(range(T)):
                rows, times = running(trace.lengths, s, reverse=direction == 1)
                d_states[0, k, s + 1, rows] += d_layer_output[times, rows, direction * H : (direction + 1) * H]
                for b in rows:
                    norm = np.sqrt((d_states[:, k, s + 1, b] ** 2).sum())
                    if norm > clip_states:
                        d_states[:, k, s + 1, b] *= clip_states / norm
                d_new = d_states[:, k, s + 1, rows]
                limited = p | {"limit": clip_gates}
                dx, d_old, d_total, grads = CELLS[trace.cell].step_backward(limited, *trace.saved[k][s], *d_new)
                d_states[:, k, s + 1, rows] = d_total
                d_states[:, k, s] = d_states[:, k, s + 1]  # passed on where the sequence has ended
                d_states[:, k, s, rows] = d_old
                d_layer_input[times, rows] += dx
                for name in p:
                    d_params[name + suffix(k, D)] += grads[name]
        d_layer_output = d_layer_input
    dh, dc = list(d_states[0]), list(d_states[1]) if S == 2 else []
    return Grads(d_params, d_layer_output, dh, dc, unstacked(d_states[:, :, 0].copy()))


def jacobian(cell, params, x_t, h, c=None):
    """d(new state)/d(old state), (S·H, S·H), the state being h (H,) or [h; c]; params of one layer, without suffix."""
    old = np.array([[h]] if c is None else [[h], [c]], np.float64)  # (S, 1, H)
    S, _, H = old.shape
    _, saved = CELLS[cell].step(params, np.array([x_t], np.float64), *old)
    rows = []
    for unit in np.eye(S * H):
        _, d_old, _, _ = CELLS[cell].step_backward(params, *saved, *unit.reshape(S, 1, H))
        rows.append(np.concatenate(d_old, axis=1)[0])
    return np.stack(rows)
