"""The CUDA kernels without a GPU: what they compute in the simulator, and what they compile to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import KINDS, full_chip
from numba import types

import rnnlab
from rnnlab import CELLS
from rnnlab.kernels import DeviceNotAvailable, available, backend
from rnnlab.kernels.plan import ARITHMETIC, H200, plan
from rnnlab.peers import DTYPES

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.registers import assembled, compiled, kernel_of, resources

pytest.importorskip("numba_cuda")


def test_kernels_in_the_simulator_equal_the_textbook():
    """In a process of its own: the simulator takes the place of numba.cuda when that is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "simulated_cuda.py"]
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


TIERS = {"A": {"tiers": "A", "blocks": (4,)}, "B": {"tiers": "B", "blocks": (4,)}, "C": {"tiers": "C", "blocks": (2,)}}


def capabilities(dtype, tier):
    """The compute capabilities for which a kernel is compiled: clusters need 9.0; for the others both in float32."""
    if tier == "A":
        return [(9, 0)]
    return [(8, 0), (9, 0)] if dtype == "float32" else [(8, 0) if tier == "B" else (9, 0)]


def kernels(cell, dtype, tier, **flags):
    """The kernels of a layout with the types of their arguments: forward and backward, or with `scaled` that."""
    for backward in (True,) if flags else (False, True):
        problem, options = (cell.name, dtype, 3, 33, backward), TIERS[tier] | {"threads": (64,)}
        made = plan(*problem, chip=full_chip(*problem, **options) if tier == "C" else H200, **options)
        kernel, arguments = kernel_of(made, **flags)
        yield kernel, made, arguments


def assert_clean(ptx, dtype, capability):
    assert dtype == "float64" or ".f64" not in ptx
    assert ".local" not in ptx  # no array in memory
    assert "call" not in ptx  # all is inlined
    report = assembled(ptx, capability)
    assert "0 bytes spill stores, 0 bytes spill loads" in report, report


@pytest.mark.parametrize(
    ("cell", "dtype", "tier"),
    [(c, d, t) for c in CELLS for d in ARITHMETIC for t in TIERS if t == "A" or c in KINDS],
)
def test_kernels_compile_without_float64_and_memory_of_their_own(cell, dtype, tier):
    for kernel, made, arguments in kernels(CELLS[cell], dtype, tier):
        assert made.tier == tier
        for capability in capabilities(dtype, tier):
            ptx = compiled(kernel, made.threads, capability, arguments)
            assert_clean(ptx, dtype, capability)
            assert ("mma.sync" in ptx) == (ARITHMETIC[dtype].rows > 1)
            assert ("barrier.cluster" in ptx) == ("st.shared::cluster" in ptx) == (tier == "A")
            assert ("ld.acquire.gpu" in ptx) == ("cp.async" in ptx) == (tier != "A")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_scaled_kernels_compile_without_float64_and_memory_of_their_own(cell, dtype):
    for kernel, made, arguments in kernels(CELLS[cell], dtype, "A", scaled=True):
        assert_clean(compiled(kernel, made.threads, (9, 0), arguments), dtype, (9, 0))


def test_packing_and_rounding_compile():
    from rnnlab.kernels.cuda_block import narrow_kernel, pack_kernel

    single = types.Array(types.float32, 1, "C")
    for dtype, kind in (("float32", types.float32), ("bf16", types.int32), ("fp16", types.int32)):
        made = plan("lstm", dtype, 16, 512)
        ptx = compiled(pack_kernel(made, 0), made.threads, (9, 0), (single, types.Array(kind, 1, "C")))
        assert_clean(ptx, dtype, (9, 0))
    ptx = compiled(narrow_kernel("bf16"), made.threads, (9, 0), (single, types.Array(types.int16, 1, "C")))
    assert "cvt.rn.bf16.f32" in ptx


@pytest.mark.skipif(available("cuda") is None, reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_why():
    with pytest.raises(DeviceNotAvailable, match=r"^device 'cuda' cannot be used: [^\n]+$"):
        backend("cuda")
    with pytest.raises(DeviceNotAvailable, match=r"^device 'cuda' cannot be used: [^\n]+$"):
        rnnlab.LSTM(2, 3, device="cuda")
    with pytest.raises(ValueError, match="device must be one of cpu, cuda, got 'tpu'"):
        rnnlab.GRU(2, 3, device="tpu")


def test_arithmetics_are_those_that_are_compared():
    assert set(ARITHMETIC) == set(DTYPES)
    assert plan("lstm", "float32", 1, 32).cycles < plan("lstm", "float32", 1, 1024).cycles
    assert H200.processors == 132


@pytest.mark.parametrize(
    "problem", [("lstm", "bf16", 16, 128), ("rnn_tanh", "float32", 64, 512), ("lstm", "float64", 53, 256)]
)
def test_registers_of_a_kernel_hold_its_weights_and_no_memory_does(problem):
    """The second has 512 threads, of 128 registers, and takes five sequences at a time; the third is of 64 bits."""
    found = resources(plan(*problem))
    assert 32 < found["registers"] <= 255  # of a thread: NVIDIA's limit, and more than no weights at all would take
    assert found["local_bytes"] == found["spilled_bytes"] == 0


def test_numba_finds_what_numpy_has_no_more():
    code = (
        "import numpy as np\n"
        "vars(np).pop('row_stack', None)\n"
        "import rnnlab.kernels\n"
        "assert vars(np)['row_stack'] is np.vstack\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
