"""What only a GPU can show: `pytest -m gpu`. Equality with the CPU, and launches that repeat, overlap and fail well."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import full_chip, random_network, random_state, relative_error

from rnnlab import CELLS
from rnnlab.kernels import LayerWeights, available, backend, cpu
from rnnlab.kernels.plan import plan
from rnnlab.peers import DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # those of CuPy and PyTorch
    pytest.mark.skipif(available("cuda") is not None, reason=str(available("cuda"))),
]


@pytest.fixture
def cuda():
    return backend("cuda")


def problem(cell, T, B, H, dtype="float32", seed=0):
    """A network of one layer and its inputs: x, state, lengths, dL/doutput, dL/dfinal."""
    net, _ = random_network(cell, 5, H, dtype=dtype, scale=H**-0.5, seed=seed)
    rng = np.random.default_rng(seed)
    x, d_output = (rng.normal(size=(T, B, n)).astype(dtype) for n in (5, H))
    states = [net.stack_state("state", random_state(rng, net, B), B)[:, 0] for _ in range(2)]
    return net, x, states[0], rng.integers(1, T + 1, B), d_output, states[1]


def run(kernels, net, x, state, lengths, d_output, d_final, **arithmetic):
    """States, their total derivatives, dL/dx and those of all weights."""
    trace = kernels.forward(net.cell, x, net.weights(0), state, lengths, True, **arithmetic)
    gradients = kernels.backward(net.cell, trace, net.weights(0), d_output, d_final, **arithmetic)
    return [trace.state, gradients.state, gradients.x, *gradients.weights]


def exact(net, *arrays):
    """The same in float64 on the CPU."""
    wide, _ = random_network(net.cell.name, net.input_size, net.hidden_size, seed=0)
    wide.params.flat[...] = net.params.flat
    return run(cpu, wide, *(a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays))


def bound(arithmetic, T):
    """Roundings of unit u, of the sums and gates of a step, over T steps that add up as a random walk."""
    return 30 * DTYPES[arithmetic] * np.sqrt(T)


@pytest.mark.parametrize("T", [1, 2, 1000])
@pytest.mark.parametrize("H", [1, 31, 65, 120, 130, 1000])
@pytest.mark.parametrize("B", [1, 3, 7, 17])
def test_awkward_shapes_equal_the_cpu(B, H, T, cuda):
    cells = sorted(CELLS)
    net, *arrays = problem(cells[(B + H + T) % len(cells)], T, B, H)
    for got, want in zip(run(cuda, net, *arrays), exact(net, *arrays), strict=True):
        assert relative_error(got, want) <= bound("float32", T)


@pytest.mark.parametrize("tier", "ABC")
@pytest.mark.parametrize("arithmetic", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_arithmetic_and_tier_equals_the_cpu(cell, arithmetic, tier, cuda, monkeypatch):
    if tier == "A" and cuda.chip().capability < (9, 0):
        pytest.skip("clusters need compute capability 9.0")

    def narrowed(*args):
        options = {"tiers": tier, "blocks": (8,), "threads": (256,)}
        chip = full_chip(*args[:-1], **options) if tier == "C" else args[-1]
        return plan(*args[:-1], chip=chip, **options)

    monkeypatch.setattr(cuda, "plan", narrowed)
    net, *arrays = problem(cell, 20, 9, 200, "float64" if arithmetic == "float64" else "float32")
    found = run(cuda, net, *arrays, arithmetic=arithmetic)
    for got, want in zip(found, exact(net, *arrays), strict=True):
        assert relative_error(got, want) <= bound(arithmetic, 20)


@pytest.mark.parametrize(("cell", "H"), [("lstm", 256), ("gru", 1000), ("gru_reset_before", 300)])
def test_repeated_launches_give_the_same_bits_and_overwrite_everything(cell, H, cuda):
    net, *arrays = problem(cell, 50, 9, H)
    x, state, lengths, d_output, d_final = map(cuda.xp.asarray, arrays)
    weights = LayerWeights(*map(cuda.xp.asarray, net.weights(0)))
    forward, trace = cuda.prepare_forward(net.cell, x, weights, state, lengths, True)
    backward, gradients = cuda.prepare_backward(net.cell, trace, weights, d_output, d_final)
    results = [trace.state, trace.saved, gradients.state, gradients.x, *gradients.weights]
    seen = None
    for _ in range(100):
        for array in results:
            array[...] = np.nan
        forward()
        backward()
        now = [array.get() for array in results]
        assert all(np.isfinite(array).all() for array in now)
        if seen is not None:
            for array, first in zip(now, seen, strict=True):
                np.testing.assert_array_equal(array, first)
        seen = now
    for array in results:
        array[...] = np.nan
    replay = cuda.capture(lambda: (forward(), backward()))
    replay()
    for array, first in zip(results, seen, strict=True):
        np.testing.assert_array_equal(array.get(), first)


def test_two_streams_at_once(cuda):
    """Grids that wait for each other's blocks must not wait for ever when two of them share the chip."""
    net, *arrays = problem("lstm", 200, 9, 1000)
    want, streams, done = run(cuda, net, *arrays), [cuda.xp.cuda.Stream(non_blocking=True) for _ in range(2)], []
    device = [cuda.xp.asarray(a) for a in arrays]
    weights = LayerWeights(*map(cuda.xp.asarray, net.weights(0)))
    cuda.xp.cuda.Device().synchronize()
    for stream in streams:
        with stream:
            trace = cuda.forward(net.cell, device[0], weights, device[1], device[2])
            done.append((trace, cuda.backward(net.cell, trace, weights, *device[3:])))
    for stream, (trace, gradients) in zip(streams, done, strict=True):
        stream.synchronize()
        np.testing.assert_array_equal(trace.state.get(), want[0])
        np.testing.assert_array_equal(gradients.state.get(), want[1])


def test_tensors_of_pytorch_are_taken_without_a_copy(cuda):
    torch = pytest.importorskip("torch")
    net, *arrays = problem("gru", 20, 3, 64)
    x = torch.from_numpy(arrays[0]).cuda()
    _, trace = cuda.prepare_forward(net.cell, x, net.weights(0), arrays[1], arrays[2], False)
    assert trace.x.data.ptr == x.data_ptr()


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_the_scaled_adjoint_equals_the_plain_one(cell, cuda):
    nets = [random_network(cell, 3, 70, scale=0.1, device=device, seed=1)[0] for device in ("cpu", "cuda")]
    rng, found = np.random.default_rng(2), []
    x, d_output = rng.normal(size=(300, 4, 3)), rng.normal(size=(300, 4, 70))
    for net in nets:
        (layer,), dx, exponent = net.backpropagate(net.forward(x), d_output, scaled=True)
        found.append((np.ldexp(layer.state, layer.exponent[:, :, None]), np.ldexp(dx, exponent[:, :, None])))
    for got, want in zip(*reversed(found), strict=True):
        assert relative_error(got, want) <= 1e-11  # see conftest.TOLERANCE, over 300 steps


def test_kernels_have_no_memory_of_their_own(cuda):
    from rnnlab.kernels.cuda_forward import forward_kernel

    for H in (128, 512, 1024):
        net, x, state, lengths, *_ = problem("lstm", 3, 16, H)
        made = plan("lstm", "float32", 16, H, False, cuda.chip())
        cuda.forward(net.cell, x, net.weights(0), state, lengths)
        (compiled,) = forward_kernel(net.cell, made, True).overloads.values()
        assert compiled.local_mem_per_thread == 0


def test_memory_that_is_not_there_is_said(cuda):
    net, *_ = problem("lstm", 1, 1, 1000)
    x = cuda.xp.zeros((2, 1, 5), np.float32)
    huge = cuda.xp.lib.stride_tricks.as_strided(x, (2**24, 64, 5), (0, 0, 4))
    with pytest.raises(Exception, match=r"[Oo]ut of memory"):
        cuda.forward(net.cell, huge, net.weights(0), np.zeros((2, 64, 1000), np.float32), np.full(64, 2**24))


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("H", [64, 1000, 4000])
def test_sanitizer_finds_nothing(tool, H):
    code = (
        "import numpy as np, rnnlab\n"
        f"net = rnnlab.LSTM(4, {H}, device='cuda', seed=0)\n"
        "trace = net.forward(np.ones((3, 5, 4), np.float32))\n"
        "net.backward(trace, np.ones_like(trace.output))\n"
    )
    options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]  # CuPy tries attributes out
    command = ["compute-sanitizer", *options, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
