"""The CUDA kernels in the simulator, against the textbook. Run by `test_kernels_cuda`, in a process of its own."""

import gpu_simulator
import naive
import numpy as np
import pytest
from conftest import KINDS, TOLERANCE, full_chip, random_network, random_state, relative_error
from test_kernels_cpu import errors, run_both, worst

from rnnlab import (
    CELLS,
    Inference,
    Recurrent,
    SequenceModel,
    TrainingStep,
    contribution_matrix,
    gradient_flow,
    lyapunov_spectrum,
)
from rnnlab.clipping import PerTimeStep, clipped_gradients
from rnnlab.costs import Shape
from rnnlab.kernels import cuda
from rnnlab.kernels.plan import Chip, plan
from rnnlab.kernels.ptx import SIMULATED
from rnnlab.optim import SGD
from rnnlab.peers import DTYPES, NotApplicable, Problem, prepare_rnnlab, tolerance, worst_error

assert SIMULATED
gpu_simulator.install()

#: Options of the planner that make tiny problems span several blocks, tiles and slices of the batch.
LAYOUTS = {
    "one block": {"tiers": "A", "blocks": (1,), "threads": (8,)},
    "cluster": {"tiers": "A", "blocks": (3,), "threads": (4,), "chip": Chip((9, 0), 6, 6000)},
    "grid": {"tiers": "B", "blocks": (2,), "threads": (6,)},
    "streams": {"tiers": "C", "blocks": (2,), "threads": (10,)},
}


@pytest.fixture
def layout(monkeypatch):
    """A function that fixes the plans to come, and the list of those that were made."""
    made = []

    def choose(name):
        def narrowed(cell, dtype, B, H, backward, chip):
            if name == "streams":
                chip = full_chip(cell, dtype, B, H, backward, **LAYOUTS["streams"])
            made.append(plan(cell, dtype, B, H, backward, **({"chip": chip} | LAYOUTS[name])))
            return made[-1]

        monkeypatch.setattr(cuda, "plan", narrowed)
        return made

    return choose


def both(cell, T, B, H, dtype="float32", lengths=None, arithmetic=None, seed=0):
    """What the kernels and the textbook make of one layer, as {name: (got, exact)}."""
    net, params = random_network(cell, 3, H, dtype=dtype, scale=H**-0.5, seed=seed)
    rng = np.random.default_rng(seed + 1)
    x, state = rng.normal(size=(T, B, 3)).astype(dtype), random_state(rng, net, B)
    d_output, d_final = rng.normal(size=(T, B, H)).astype(dtype), random_state(rng, net, B)
    steps = np.full(B, T) if lengths is None else np.array(lengths)
    stacked = [net.stack_state("state", s, B)[:, 0] for s in (state, d_final)]
    trace = cuda.forward(net.cell, x, net.weights(0), stacked[0], steps, True, arithmetic)
    gradients = cuda.backward(net.cell, trace, net.weights(0), d_output, stacked[1], arithmetic=arithmetic)
    exact = naive.forward(cell, params, x, state, steps)
    slopes = naive.backward(exact, d_output, d_final)
    pairs = {"h": (trace.state[0], exact.h[0]), "dh": (gradients.state[0], slopes.h[0]), "dx": (gradients.x, slopes.x)}
    if len(trace.state) > 1:
        pairs |= {"c": (trace.state[1], exact.c[0]), "dc": (gradients.state[1], slopes.c[0])}
    names = [name.removesuffix("_l0") for name in net.params]
    pairs |= {f"d {n}": (getattr(gradients.weights, n), slopes.params[f"{n}_l0"]) for n in names}
    return pairs


def worst_of(pairs):
    return worst({name: relative_error(*pair) for name, pair in pairs.items()})


@pytest.mark.parametrize(("cell", "name"), [(c, n) for c in CELLS for n in LAYOUTS if c in KINDS or n == "cluster"])
def test_float32_equals_the_textbook(cell, name, layout):
    made = layout(name)
    T = 4
    found = worst_of(both(cell, T, 3, 17 if name == "streams" else 5, lengths=[4, 2, 3]))
    # 8: the roundings of one step, see test_kernels_cpu.
    assert found[1] <= 8 * np.finfo(np.float32).eps * np.sqrt(T), found
    assert {one.tier for one in made} == set(LAYOUTS[name]["tiers"])


@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 1), (1, 3, 5), (2, 1, 7), (5, 7, 3)])
@pytest.mark.parametrize("name", ["cluster", "grid"])
@pytest.mark.parametrize("cell", ["lstm_peephole", "gru_reset_before"])
def test_float64_equals_the_textbook_in_small_and_odd_shapes(cell, name, T, B, H, layout):
    layout(name)
    found = worst_of(both(cell, T, B, H, "float64", seed=2))
    assert found[1] <= TOLERANCE, found


#: One warp and two; 20 sequences are two blocks of columns of a tensor core and a part of one.
TENSOR = [("A", 1, 64, 3, 13), ("A", 2, 32, 20, 13), ("B", 2, 64, 9, 13)]


@pytest.mark.parametrize(
    ("cell", "arithmetic", "tiers", "blocks", "threads", "B", "H"),
    [("lstm", arithmetic, *layout) for arithmetic in ("tf32", "bf16", "fp16") for layout in TENSOR]
    + [("gru_reset_before", "bf16", *TENSOR[0]), ("lstm", "bf16", "C", 2, 32, 3, 33)],
)
def test_tensor_cores_equal_the_textbook(cell, arithmetic, tiers, blocks, threads, B, H, monkeypatch):
    def narrowed(*problem):
        options = {"tiers": tiers, "blocks": (blocks,), "threads": (threads,)}
        chip = Chip((9, 0), 4, 40_000) if tiers != "C" else full_chip(*problem[:-1], **options)
        return plan(*problem[:-1], chip=chip, **options)

    monkeypatch.setattr(cuda, "plan", narrowed)
    T = 2
    found = worst_of(both(cell, T, B, H, arithmetic=arithmetic, seed=4))
    # 12: the weights, the vector, x, dL/da and h are rounded to unit u, for T steps and four gates.
    assert found[1] <= 12 * DTYPES[arithmetic] * np.sqrt(T), found


@pytest.mark.parametrize(("cell", "name"), [("lstm", "cluster"), ("gru_reset_before", "grid")])
def test_networks_equal_the_textbook(cell, name, layout):
    layout(name)
    net, params = random_network(cell, 3, 5, 2, bidirectional=True, device="cuda", seed=5)
    got, want = run_both(net, params, 4, 3, lengths=[3, 1, 4], rng=np.random.default_rng(6))
    assert worst(errors(got, want))[1] <= TOLERANCE
    lean = net.forward(got[0].layers[0].x, got[0].final, [3, 1, 4], keep=False)
    kept = net.forward(got[0].layers[0].x, got[0].final, [3, 1, 4])
    np.testing.assert_array_equal(lean.output, kept.output)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_jacobian_equals_the_textbook(cell, layout):
    layout("one block")
    net, params = random_network(cell, 3, 5, device="cuda", seed=5)
    x = np.random.default_rng(6).normal(size=(3, 2, 3))
    trace = net.forward(x)
    old = [states[0][1, 1] for states in (trace.h, trace.c) if states]
    exact = naive.jacobian(cell, naive.layer_params(params, 0, 1), x[1, 1], *old)
    assert relative_error(net.jacobian(trace, 1)[1], exact) <= TOLERANCE


@pytest.mark.parametrize(("cell", "name"), [("lstm", "cluster"), ("lstm", "grid"), ("gru_reset_before", "grid")])
def test_scaled_adjoint_equals_the_textbook(cell, name, layout):
    layout(name)
    net, params = random_network(cell, 3, 5, 2, device="cuda", seed=5)
    rng = np.random.default_rng(7)
    x, d_output = rng.normal(size=(5, 3, 3)), rng.normal(size=(5, 3, 5))
    d_output[:, 1] *= 1e-200  # sequences have scales of their own
    trace = net.forward(x, lengths=[5, 3, 4])
    layers, dx, exponent = net.backpropagate(trace, d_output, scaled=True)
    exact = naive.backward(naive.forward(cell, params, x, None, [5, 3, 4], 2), d_output)
    pairs = [(np.ldexp(dx, exponent[:, :, None]), exact.x)]
    for layer, *states in zip(layers, *(kind for kind in (exact.h, exact.c) if kind), strict=True):
        pairs += zip(np.ldexp(layer.state, layer.exponent[:, :, None]), states, strict=True)
        largest = np.abs(layer.state[:, 1:]).max(axis=(0, 3))
        assert (largest[largest > 0] < 2).all()  # a sum of two numbers below 1
    for got, want in pairs:
        for b in range(3):
            assert relative_error(got[:, b], want[:, b]) <= TOLERANCE


def test_scaled_adjoint_does_not_underflow(layout):
    """One tanh unit at rest has slope 1: dL/dh_t = w^(T−t), here a power of two and so exactly known."""
    layout("one block")
    T = 200
    net = Recurrent("rnn_tanh", 1, 1, device="cuda")
    net.params.flat[...] = 0
    net.params["weight_hh_l0"] = np.full((1, 1), 0.5, np.float32)
    trace = net.forward(np.zeros((T, 1, 1), np.float32))
    d_final = np.ones((1, 1, 1), np.float32)
    (layer,), _, _ = net.backpropagate(trace, np.zeros((T, 1, 1), np.float32), d_final, scaled=True)
    log = np.log2(layer.state[0, :, 0, 0].astype(float)) + layer.exponent[:, 0]
    np.testing.assert_array_equal(log, np.arange(-T, 1))


def test_models_and_gradient_flow_run_on_the_device(layout):
    layout("one block")
    flows, losses = [], []
    x, targets = np.random.default_rng(8).normal(size=(6, 2, 3)), np.array([1, 0])
    for device in ("cpu", "cuda"):
        net, _ = random_network("lstm", 3, 5, device=device, seed=5)
        model = SequenceModel(net, 2, seed=9)
        losses.append(model.loss_and_gradients(x, targets))
        flows.append(gradient_flow(model, x, targets))
        recomputed = model.loss_and_gradients(x, targets, checkpoint=2)
        assert relative_error(recomputed.params.flat, losses[-1].params.flat) <= TOLERANCE
    assert relative_error(losses[1].params.flat, losses[0].params.flat) <= TOLERANCE
    np.testing.assert_allclose(flows[1].h[0], flows[0].h[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(flows[1].direct_c[0], flows[0].direct_c[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="model must be on the CPU, got Recurrent"):
        TrainingStep(model, 6, 2, SGD(0.1))
    with pytest.raises(ValueError, match="net must be on the CPU, got Recurrent"):
        Inference(net, 6, 2)
    with pytest.raises(ValueError, match="model must have one direction and be on the CPU"):
        contribution_matrix(model, x, targets, "last")
    with pytest.raises(ValueError, match="net must run in one direction on the CPU"):
        lyapunov_spectrum(net, steps=2, transient=0)
    with pytest.raises(ValueError, match="clipping within BPTT needs a network on the CPU"):
        clipped_gradients(model, x, targets, PerTimeStep(0.1))


@pytest.mark.parametrize(("scope", "dtype"), [("forward", "float32"), ("training", "float32"), ("training", "bf16")])
def test_what_is_compared_with_peers_is_right(scope, dtype, layout, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "warps", {"tiers": "A", "blocks": (1,), "threads": (64,)})
    layout("warps")
    problem = Problem(Shape("lstm", 3, 2, 3, 5), scope, dtype, "cuda")
    run = prepare_rnnlab(problem)
    run.call()
    exact = prepare_rnnlab(Problem(problem.shape, "training", "float64")).result()
    exact = exact if scope == "training" else {"output": exact["output"]}
    assert run.result().keys() == exact.keys()
    assert worst_error(run.result(), exact) <= tolerance(problem)
    with pytest.raises(NotApplicable, match="not in whole steps"):
        prepare_rnnlab(Problem(problem.shape, "step", dtype, "cuda"))
