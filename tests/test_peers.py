"""Peers: what each computes equals our float64; what none can run says so."""

import numpy as np
import pytest

from rnnlab import peers
from rnnlab.costs import Shape
from rnnlab.kernels import DeviceNotAvailable, available

# What libraries say of themselves while they are imported or traced is none of this project's warnings.
pytestmark = pytest.mark.filterwarnings("default")


def problem(cell="lstm", scope="training", dtype="float32", **options):
    return peers.Problem(Shape(cell, 20, 3, 4, 9), scope, dtype, **options)


def reference(which):
    run = peers.prepare_rnnlab(peers.Problem(which.shape, which.scope, "float64", seed=which.seed))
    run.call()
    return run.result()


@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if "cpu" in peer.devices])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
@pytest.mark.parametrize("scope", peers.SCOPES)
def test_peer_computes_what_we_compute(name, cell, scope):
    peer = peers.PEERS[name]
    if reason := peer.missing():
        pytest.skip(reason)
    which = problem(cell, scope)
    if name == "onnxruntime" and scope != "forward":
        with pytest.raises(peers.NotApplicable, match="inference in float32 on the CPU"):
            peer.prepare(which)
        return
    run = peer.prepare(which)
    run.call()
    assert peers.worst_error(run.result(), reference(which)) < peers.tolerance(which)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scope", peers.SCOPES)
def test_ours_passes_its_own_check(scope, dtype):
    which = problem("gru", scope, dtype)
    run = peers.prepare_rnnlab(which)
    run.call()
    result = run.result()
    assert peers.worst_error(result, reference(which)) < peers.tolerance(which)
    assert result.keys() == reference(which).keys()
    assert next(iter(result.values())).dtype == dtype


def test_a_wrong_number_is_seen():
    which = problem()
    exact = reference(which)
    wrong = {name: array.copy() for name, array in exact.items()}
    wrong["bias_hh_l0"][3] *= 1.001
    assert peers.worst_error(wrong, exact) > peers.tolerance(which)
    wrong["bias_hh_l0"][3] = np.nan  # compares with nothing, and is not the first array
    assert not peers.worst_error(wrong, exact) <= peers.tolerance(which)
    del wrong["x"]
    with pytest.raises(ValueError, match="result lacks x"):
        peers.worst_error(wrong, exact)


def test_weights_and_inputs_are_the_same_numbers_in_every_dtype():
    single, double = problem(dtype="float32"), problem(dtype="float64")
    np.testing.assert_array_equal(single.network().params.flat, double.network().params.flat)
    np.testing.assert_array_equal(single.model().params.flat, double.model().params.flat)
    for a, b in zip(single.arrays(), double.arrays(), strict=True):
        np.testing.assert_array_equal(a, b)
    other = problem(seed=1)
    assert not np.array_equal(other.network().params.flat, single.network().params.flat)


def test_step_clips_and_updates():
    which = problem("rnn_tanh", "step", "float64")
    model = which.model()
    x, _, labels = which.arrays()
    gradient = model.loss_and_gradients(x, labels).params.flat
    norm = np.linalg.norm(gradient)
    before = model.params.flat.copy()
    expected = before - peers.CHECKED_RATE * gradient * min(1, peers.THRESHOLD / norm)
    result = reference(which)
    # 4 roundings of numbers below 1.
    np.testing.assert_allclose(np.concatenate([array.ravel() for array in result.values()]), expected, atol=4 * 2**-53)
    halved = {name: array.copy() for name, array in result.items()}
    halved["rnn.weight_hh_l0"] = 0.5 * (halved["rnn.weight_hh_l0"] + which.model().params["rnn.weight_hh_l0"])
    assert peers.worst_error(halved, result) > peers.tolerance(problem("rnn_tanh", "step"))


def test_a_peer_that_is_not_installed_is_listed_as_such():
    peer = peers.Peer(("no_such_package",), ("cpu",), peers.prepare_torch)
    assert peer.missing() == "not installed: no_such_package"


def test_what_cannot_run_says_why():
    if available("cuda"):
        with pytest.raises(DeviceNotAvailable, match="device 'cuda' cannot be used"):
            peers.prepare_rnnlab(problem(device="cuda"))
    with pytest.raises(peers.NotApplicable, match="rnnlab has no bf16 on the CPU"):
        peers.prepare_rnnlab(problem(dtype="bf16"))
    with pytest.raises(ValueError, match="scope must be one of forward, training, step, got 'train'"):
        problem(scope="train")


def test_parameters_lie_in_the_order_of_the_cudnn_peer():
    """JAX's own unpacking of cuDNN's vector gives our arrays back."""
    rnn = pytest.importorskip("jax.experimental.rnn")
    params = problem("lstm").network().params
    unpacked = rnn.unpack_lstm_weights(params.flat, 4, 9, 1, False)
    for name, part in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), unpacked, strict=True):
        np.testing.assert_array_equal(part[0], params[f"{name}_l0"])
