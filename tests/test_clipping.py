"""Clipping: the properties of every rule, rules within BPTT against the textbook, and what each removes of a step."""

import math

import naive
import numpy as np
import pytest
from conftest import TOLERANCE, random_network, random_state, relative_error
from hypothesis import given
from hypothesis import strategies as st

from rnnlab import Recurrent, SequenceModel, clipping
from rnnlab.clipping import (
    Adaptive,
    AtPreActivations,
    ByGlobalNorm,
    ByNorm,
    ByPercentile,
    ByValue,
    PerTimeStep,
    clipped_gradients,
    energy_removed,
)
from rnnlab.kernels import set_threads, threads
from rnnlab.params import Params

WHOLE = (ByValue, ByGlobalNorm, ByNorm, Adaptive)
SHAPES = {"weight": (5, 7), "row": (1, 40), "bias": (5,)}


def gradient_of(seed, scale, dtype):
    """A gradient whose rows differ in size, and weights, one row of them zero."""
    rng = np.random.default_rng(seed)
    gradient, weights = (Params(SHAPES, np.dtype(dtype)) for _ in range(2))
    gradient.flat[...] = scale * rng.normal(size=80) * 10 ** rng.normal(size=80)
    weights.flat[...] = rng.normal(size=80)
    weights["weight"][2] = 0
    return gradient, weights


def parts(rule, params):
    """Each part that is clipped on its own, as the definition has it."""
    if rule is ByGlobalNorm:
        return [params.flat]
    if rule is ByNorm:
        return list(params.values())
    return [*params["weight"], params["row"][0], params["bias"]]


@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-6, 1e6),
    threshold=st.floats(1e-3, 1e3),
    dtype=st.sampled_from(["float32", "float64"]),
)
@pytest.mark.parametrize("rule", WHOLE)
def test_properties_of_rules_for_the_whole_gradient(rule, seed, scale, threshold, dtype):
    gradient, weights = gradient_of(seed, scale, dtype)
    before = gradient.flat.copy()
    clipped, record = rule(threshold)(gradient, weights)
    np.testing.assert_array_equal(gradient.flat, before)  # a copy is clipped
    u = float(np.finfo(dtype).eps)  # a factor and a product are rounded,
    w = 2 * u + 1e-14  # and in norms 80 terms, added in float64
    expected = gradient.like()
    if rule is ByValue:
        expected.flat[...] = np.clip(before, -np.array(threshold, dtype), np.array(threshold, dtype))
    else:
        for old, new, weight in zip(parts(rule, gradient), parts(rule, expected), parts(rule, weights), strict=True):
            limit = threshold * (max(np.linalg.norm(weight.astype(float)), 1e-3) if rule is Adaptive else 1)
            norm = np.linalg.norm(old.astype(float))
            new[...] = old * min(1, limit / norm)
            assert np.linalg.norm(new.astype(float)) <= limit * (1 + w)
            if norm <= limit:
                np.testing.assert_array_equal(new, old)
    np.testing.assert_allclose(clipped.flat, expected.flat, rtol=w, atol=0)
    again, once_more = rule(threshold)(clipped, weights)
    np.testing.assert_allclose(again.flat, clipped.flat, rtol=w, atol=0)
    assert once_more.norm == pytest.approx(record.clipped_norm, rel=w)
    exact, found = before.astype(float), clipped.flat.astype(float)
    assert record.norm == pytest.approx(np.linalg.norm(exact), rel=1e-14)
    assert record.clipped_norm == pytest.approx(np.linalg.norm(found), rel=w)
    assert record.cosine == pytest.approx(exact @ found / np.linalg.norm(exact) / np.linalg.norm(found), rel=2 * w)
    assert record.fraction == (clipped.flat != before).mean()
    if rule is ByGlobalNorm:
        assert record.cosine == pytest.approx(1, rel=1e-14)


def test_percentile_of_the_norms_so_far():
    history, norms = clipping.new_history(), []
    for seed, scale in enumerate([1.0, 0.1, 30.0, 2.0, 2.0, np.nan, 7.0]):
        gradient, _ = gradient_of(seed, scale, "float64")
        norm = np.linalg.norm(gradient.flat)
        norms += [norm] if np.isfinite(norm) else []
        clipped, record = ByPercentile(40)(gradient, None, history)
        if np.isfinite(norm):
            limit = np.percentile(norms, 40)
            np.testing.assert_allclose(clipped.flat, gradient.flat * min(1, limit / norm), rtol=1e-14)
            assert record.clipped_norm == pytest.approx(min(norm, limit), rel=1e-14)
        else:
            assert np.isnan(record.clipped_norm)
    assert history[0] == len(norms) == 6
    np.testing.assert_allclose(history[1:7], np.sort(norms), rtol=1e-14)
    alone, _ = ByPercentile(40)(gradient)  # without a history a norm is its own percentile
    np.testing.assert_array_equal(alone.flat, gradient.flat)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rule", [*WHOLE, ByPercentile])
def test_what_is_not_finite_stays_so(rule, bad):
    gradient, weights = gradient_of(0, 1.0, "float32")
    gradient["weight"][1, 1] = bad
    clipped, record = rule(0.5)(gradient, weights)
    assert not np.isfinite(clipped["weight"][1, 1])
    assert not np.isfinite(record.norm)
    assert not np.isfinite(record.clipped_norm)


def problem(cell, every=False, B=3, **options):
    net, _ = random_network(cell, 3, 11, scale=0.7, seed=1, **options)
    model = SequenceModel(net, 2, "many_to_many" if every else "many_to_one", "mse", seed=1)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(9, B, 3)).astype(net.dtype)
    return model, x, rng.normal(size=(9, B, 2) if every else (B, 2)).astype(net.dtype)


#: Thresholds that clip some of what they look at, and not all: in networks with random adjoints, in those of `problem`.
WITHIN = {"clip_states": (PerTimeStep, 0.5, 0.02), "clip_gates": (AtPreActivations, 0.01, 0.01)}


@pytest.mark.parametrize("shape", ["plain", "lengths", "stacked"])
@pytest.mark.parametrize("kind", WITHIN)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_clipping_within_bptt_is_that_of_the_textbook(cell, kind, shape):
    rule, threshold, _ = WITHIN[kind]
    layers, lengths = 2 if shape == "stacked" else 1, [9, 2, 6] if shape == "lengths" else None
    net, params = random_network(cell, 3, 11, layers, scale=0.7, seed=1)
    rng = np.random.default_rng(2)
    x, d_output = rng.normal(size=(9, 3, 3)), 0.1 * rng.normal(size=(9, 3, 11))
    d_final = random_state(rng, net, 3, 0.5)
    trace, counts = net.forward(x, None, lengths), np.zeros((threads(), 8), np.int64)
    got = net.gradients(trace, d_output, d_final, clip=(rule.within, threshold, counts))
    textbook = naive.forward(cell, params, x, None, lengths, layers)
    want = naive.backward(textbook, d_output, d_final, **{kind: threshold})
    unclipped = naive.backward(textbook, d_output, d_final)
    for name, exact in want.params.items():
        assert relative_error(got.params[name], exact) <= TOLERANCE, name
        assert relative_error(unclipped.params[name], exact) > 0.01, name
    assert relative_error(got.x, want.x) <= TOLERANCE
    assert relative_error(np.stack(got.h), np.stack(want.h)) <= TOLERANCE
    clipped, seen = counts[:, :2].sum(axis=0)
    rows = 27 if lengths is None else sum(lengths)
    gates = (1 if net.cell.joint else 2) * len(net.params["bias_ih_l0"])
    assert seen == layers * rows * (1 if kind == "clip_states" else gates)
    assert 0.1 < clipped / seen < 0.9
    if kind == "clip_states":
        norms = np.sqrt(sum(np.square(part[-1]).sum(axis=-1) for part in (got.h, got.c) if part))
        if cell.startswith("lstm"):  # there c also counts what it does to h of the same step
            norms = np.linalg.norm(got.h[-1], axis=-1)
        ran = np.arange(9)[:, None] < trace.lengths  # past its end a sequence only hands its adjoint on
        assert norms[1:][ran].max() <= threshold * (1 + 1e-14)


@pytest.mark.parametrize("kind", WITHIN)
def test_clipping_within_bptt_depends_on_no_thread(kind):
    rule, threshold, _ = WITHIN[kind]
    net = Recurrent("lstm", 5, 70, dtype="float64", seed=0)
    rng, limit = np.random.default_rng(0), threads()
    x, d_output = rng.normal(size=(40, 32, 5)), rng.normal(size=(40, 32, 70))
    found = []
    try:
        for count in (1, 2, 3):
            set_threads(count)
            trace, counts = net.forward(x), np.zeros((count, 8), np.int64)  # backward shares the batch as forward did
            found.append(net.gradients(trace, d_output, clip=(rule.within, threshold, counts)))
            assert (counts[:, 1] > 0).all()
    finally:
        set_threads(limit)
    for other in found[1:]:
        np.testing.assert_array_equal(other.params.flat, found[0].params.flat)
        np.testing.assert_array_equal(other.h[0], found[0].h[0])


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("kind", WITHIN)
def test_gradients_of_a_model_clipped_within_bptt(kind, every):
    rule, _, threshold = WITHIN[kind]
    model, x, targets = problem("gru", every)
    exact = model.loss_and_gradients(x, targets).params
    gradient, record = clipped_gradients(model, x, targets, rule(threshold))
    assert 0 < record.fraction < 1
    assert record.norm == pytest.approx(np.linalg.norm(exact.flat), rel=1e-14)
    assert record.clipped_norm == pytest.approx(np.linalg.norm(gradient.flat), rel=1e-14)
    cosine = exact.flat @ gradient.flat / record.norm / record.clipped_norm
    assert record.cosine == pytest.approx(cosine, rel=1e-14)
    assert record.cosine < 1 - 1e-4
    np.testing.assert_array_equal(gradient["readout.weight"], exact["readout.weight"])
    # At 1,000 times the largest adjoint nothing is clipped, and only the order of a sum differs.
    untouched, record = clipped_gradients(model, x, targets, rule(1e3))
    np.testing.assert_allclose(untouched.flat, exact.flat, rtol=0, atol=1e-14)
    assert record.fraction == 0
    assert record.cosine == pytest.approx(1, rel=1e-14)


def test_what_does_not_fit_is_refused():
    net = Recurrent("gru", 2, 3, seed=0)
    model, other = (SequenceModel(Recurrent("gru", 2, H, seed=0), 2, seed=0) for H in (3, 4))
    with pytest.raises(ValueError, match="weights must be those of the gradient"):
        Adaptive(0.1)(model.params.like(), other.params)
    model = SequenceModel(net, 2, "encoder_decoder", teacher_forcing=True, seed=0)
    with pytest.raises(ValueError, match="one direction and inputs that are given, got encoder_decoder of Recurrent"):
        energy_removed(model, np.zeros((3, 1, 2), np.float32), np.zeros((2, 1), int), ByGlobalNorm(1.0))


def test_energy_removed_by_a_norm_is_the_same_at_every_step():
    model, x, targets = problem("lstm")
    norm = np.linalg.norm(model.loss_and_gradients(x, targets).params.flat)
    removed = energy_removed(model, x, targets, ByGlobalNorm(0.3 * norm))
    np.testing.assert_allclose(removed, 1 - 0.3**2, rtol=1e-12)
    np.testing.assert_allclose(energy_removed(model, x, targets, ByGlobalNorm(2 * norm)), 0, atol=1e-12)
    lengths = [4, 7, 2]
    x[np.arange(9)[:, None] >= lengths] = np.nan  # what lies past the end adds nothing
    norm = np.linalg.norm(model.loss_and_gradients(x, targets, lengths).params.flat)
    removed = energy_removed(model, x, targets, ByGlobalNorm(0.3 * norm), lengths)
    np.testing.assert_allclose(removed[:7], 1 - 0.3**2, rtol=1e-12)
    assert np.isnan(removed[7:]).all()


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
@pytest.mark.parametrize("rule", [ByValue(0.003), *(rule(threshold) for rule, _, threshold in WITHIN.values())])
def test_energy_removed_is_that_of_what_the_textbook_adds_at_each_step(rule, cell, monkeypatch):
    model, x, targets = problem(cell, every=True)
    params = {name[4:]: array for name, array in model.params.items() if name.startswith("rnn.")}
    textbook, row, added = naive.forward(cell, params, x), naive.CELLS[cell], []
    errors = textbook.output @ model.readout["weight"].T + model.readout["bias"] - targets
    d_output = errors / errors[..., 0].size @ model.readout["weight"]  # the mean of two squares, over all predictions

    def recorded(*arguments):
        result = row.step_backward(*arguments)
        added.insert(0, np.column_stack([result[3]["weight_ih"], result[3]["bias_ih"]]))
        return result

    monkeypatch.setitem(naive.CELLS, cell, row._replace(step_backward=recorded))
    naive.backward(textbook, d_output)
    exact = np.stack(added)
    if rule.within:
        added.clear()
        naive.backward(textbook, d_output, **{"clip_" + rule.within: rule.threshold})
        clipped = np.stack(added)
    else:
        total = exact.sum(axis=0)
        clipped = exact * (np.clip(total, -rule.threshold, rule.threshold) / total)
    want = 1 - np.square(clipped).sum(axis=(1, 2)) / np.square(exact).sum(axis=(1, 2))
    np.testing.assert_allclose(energy_removed(model, x, targets, rule), want, rtol=0, atol=TOLERANCE)
    assert want.max() > 0.1


def test_bad_arguments_are_named():
    for rule in (*WHOLE, ByPercentile, PerTimeStep, AtPreActivations):
        for bad in (0, -1.0, math.nan, math.inf, "1"):
            with pytest.raises(ValueError, match="threshold must be"):
                rule(bad)
    with pytest.raises(ValueError, match="threshold must be"):
        ByPercentile(101)
    gradient, _ = gradient_of(0, 1.0, "float64")
    with pytest.raises(ValueError, match="PerTimeStep acts within BPTT: see clipped_gradients"):
        PerTimeStep(1.0)(gradient)
    with pytest.raises(ValueError, match="weights must be the parameters for Adaptive, got None"):
        Adaptive(0.1)(gradient)
    generating = SequenceModel(Recurrent("lstm", 2, 5, dtype="float64", seed=0), 2, "one_to_many", "mse", seed=0)
    with pytest.raises(ValueError, match="clipping within BPTT needs inputs that are given, got topology one_to_many"):
        clipped_gradients(generating, np.zeros((1, 2, 2)), np.zeros((3, 2, 2)), PerTimeStep(1.0))
    two = SequenceModel(Recurrent("lstm", 2, 5, bidirectional=True, seed=0), 2, "many_to_one", "mse", seed=0)
    with pytest.raises(ValueError, match="model must have biases, one direction"):
        energy_removed(two, np.zeros((3, 2, 2), "float32"), np.zeros((2, 2), "float32"), ByValue(1.0))
