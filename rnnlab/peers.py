"""Other people's recurrent networks behind one signature, to be compared with ours.

Every implementation gets the same `Problem`: weights, inputs and random upstream gradient. It returns a `Run`, whose
`call` does the work once and returns when it is done, and whose `result` gives what it computed, so that each can be
checked against our float64 before it is timed. Building, compiling and converting weights happen before, once.

Imports of the peers are inside their functions: a peer that is not installed is listed as such and hurts nobody.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .checks import check_choice, generator
from .clipping import ByGlobalNorm
from .costs import Shape
from .kernels import DEVICES, Array, LayerWeights, backend, threads
from .model import SequenceModel
from .optim import SGD
from .prepared import Backpropagation, Inference
from .rnn import Recurrent
from .tasks import Task, check_steps, target_rows
from .training import TrainingStep

__all__ = ["DTYPES", "PEERS", "SCOPES", "NotApplicable", "Peer", "Problem", "Run", "tolerance", "train_torch"]
__all__ += ["worst_error"]

Results = dict[str, Array]

#: forward: inference; training: forward and BPTT with all gradients; step: loss, BPTT, clipping and SGD update.
SCOPES = ("forward", "training", "step")

#: Unit roundoff of each arithmetic; tf32, bf16 and fp16 multiply with it and accumulate in float32.
DTYPES = {"float32": 2.0**-24, "float64": 2.0**-53, "tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}

#: The whole training step of scope "step": classes, clipping threshold (global norm), learning rate.
CLASSES, THRESHOLD, LEARNING_RATE = 10, 1.0, 0.01

#: The learning rate of the step that is checked: with a smaller one the old weights would hide the gradient.
CHECKED_RATE = 1.0


class NotApplicable(Exception):
    """An implementation cannot run a problem; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One thing to compute: a shape, a scope, a dtype and a device; all numbers follow from `seed`.

    On the CPU everyone has as many threads as our kernels, `kernels.threads`; JAX, which takes all the cores that there
    are, where `timing.pin` has left the process as many. Raises ValueError for unknown names.
    """

    shape: Shape
    scope: str = "training"
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("scope", SCOPES), ("dtype", DTYPES), ("device", DEVICES)):
            check_choice(name, getattr(self, name), choices)

    def network(self) -> Recurrent:
        """Return the network with PyTorch's uniform weights, rounded to float32 in every dtype."""
        shape = self.shape
        net = Recurrent(
            shape.cell,
            shape.input_size,
            shape.hidden_size,
            shape.num_layers,
            bidirectional=shape.bidirectional,
            dtype=self.storage,
            seed=self.seed,
        )
        net.params.flat[...] = net.params.flat.astype(np.float32)
        return net

    def model(self) -> SequenceModel:
        """Return the network with a readout of `CLASSES` classes, read at the last step."""
        model = SequenceModel(self.network(), CLASSES, "many_to_one", "cross_entropy", seed=self.seed)
        model.params.flat[...] = model.params.flat.astype(np.float32)
        return model

    @property
    def storage(self) -> str:
        """The dtype of arrays: low-precision arithmetic starts from float32."""
        return "float64" if self.dtype == "float64" else "float32"

    def arrays(self) -> tuple[Array, Array, Array]:
        """Return x (T, B, I), the upstream gradient (T, B, D·H) and labels (B,), all random."""
        shape, dtype = self.shape, self.storage
        rng = generator(self.seed, "inputs")
        width = shape.hidden_size * (2 if shape.bidirectional else 1)
        x = rng.normal(size=(shape.steps, shape.batch, shape.input_size)).astype(np.float32).astype(dtype)
        upstream = rng.normal(size=(shape.steps, shape.batch, width)).astype(np.float32).astype(dtype)
        return x, upstream, rng.integers(CLASSES, size=shape.batch)


class Run(NamedTuple):
    """A prepared implementation: `call` works once, `result` returns what it computes, as named arrays.

    Of scope "step" that is the parameters after a first step with `CHECKED_RATE`.
    """

    call: Callable[[], Any]
    result: Callable[[], Results]


class Peer(NamedTuple):
    """An implementation: the packages it needs, its devices, and `prepare(problem)`, which may raise NotApplicable."""

    packages: tuple[str, ...]
    devices: tuple[str, ...]
    prepare: Callable[[Problem], Run]

    def missing(self) -> str | None:
        """Return why it cannot be used here, or None."""
        if absent := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            return f"not installed: {', '.join(absent)}"
        return None


def worst_error(result: Results, reference: Results) -> float:
    """Return the largest error of any array, relative to the largest number in that array."""
    if missing := reference.keys() - result.keys():
        raise ValueError(f"result lacks {', '.join(sorted(missing))}")
    errors = [
        np.abs(result[name] - exact).max() / max(np.abs(exact).max(), np.finfo(np.float64).tiny)
        for name, exact in reference.items()
    ]
    return float(np.max(errors))  # NaN where one is, which Python's max may pass over


def tolerance(problem: Problem) -> float:
    """Return the error that a correct implementation may have: 30·u·√T, rounding errors adding up as a random walk.

    u is the unit roundoff; the factor covers sums over H and B·T terms and the reordering of fused operations. In a
    step PyTorch clips to θ / (‖g‖ + 10⁻⁶), which moves the update by that much. At most 0.1: zeros are wrong by 1.
    """
    clipping = 1e-6 * CHECKED_RATE if problem.scope == "step" else 0.0
    return min(0.1, float(30 * DTYPES[problem.dtype] * np.sqrt(problem.shape.steps)) + clipping)


# rnnlab -------------------------------------------------------------------------------------------------------------


def prepare_rnnlab(problem: Problem) -> Run:
    """Prepare our own; in float64 it is the reference for the others."""
    if problem.device == "cuda":
        return _prepare_cuda(problem)
    if problem.dtype not in ("float32", "float64"):
        raise NotApplicable(f"rnnlab has no {problem.dtype} on the CPU")
    x, upstream, labels = problem.arrays()
    if problem.scope == "step":

        def step(rate: float) -> TrainingStep:
            return TrainingStep(problem.model(), x.shape[0], x.shape[1], SGD(rate), ByGlobalNorm(THRESHOLD))

        def checked() -> Results:
            first = step(CHECKED_RATE)
            first(x, labels)
            return {**first.model.params}

        timed = step(LEARNING_RATE)
        return Run(lambda: timed(x, labels), checked)
    net = problem.network()
    if problem.scope == "forward":
        run = Inference(net, *x.shape[:2])
        return Run(lambda: run(x), lambda: {"output": run(x)[0]})

    prepared = Backpropagation(net, *x.shape[:2])

    def train() -> Any:
        output, _ = prepared.forward(x)
        return output, prepared.backward(upstream)

    def result() -> Results:
        output, gradients = train()
        return {"output": output, "x": gradients.x, **gradients.params}

    return Run(train, result)


def _prepare_cuda(problem: Problem) -> Run:
    """Prepare our own on a GPU: arrays in its memory, all launches of a pass replayed as one CUDA graph."""
    kernels, shape = backend("cuda"), problem.shape
    if problem.scope == "step" or shape.num_layers != 1 or shape.bidirectional:
        raise NotApplicable("on a GPU rnnlab is compared with one layer in one direction, and not in whole steps")
    on_device, net = kernels.xp.asarray, problem.network()
    x, upstream = map(on_device, problem.arrays()[:2])
    weights = LayerWeights(*map(on_device, net.weights(0)))
    zero = on_device(net.stack_state("state", None, shape.batch)[:, 0])
    lengths, training = on_device(np.full(shape.batch, shape.steps)), problem.scope == "training"
    try:
        forward, trace = kernels.prepare_forward(net.cell, x, weights, zero, lengths, training, problem.dtype)
        runs, arrays = [forward], {"output": trace.state[0, 1:]}
        if training:
            backward, gradients = kernels.prepare_backward(
                net.cell, trace, weights, upstream, zero, arithmetic=problem.dtype
            )
            runs.append(backward)
            given = {f"{name}_l0": array for name, array in gradients.weights._asdict().items() if array.size}
            arrays |= {"x": gradients.x, **given}
    except ValueError as error:  # no layout holds the weights of so many units
        raise NotApplicable(str(error)) from error

    def work() -> None:
        for run in runs:
            run()

    call = kernels.capture(work)

    def result() -> Results:
        call()
        return {name: kernels.on_host(array).astype(np.float64) for name, array in arrays.items()}

    return Run(call, result)


# PyTorch, and cuDNN through it --------------------------------------------------------------------------------------


def _torch_classes() -> dict[str, Any]:
    import torch

    relu = partial(torch.nn.RNN, nonlinearity="relu")
    return {"rnn_tanh": torch.nn.RNN, "rnn_relu": relu, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


def prepare_torch(problem: Problem, graph: bool = False) -> Run:
    """Prepare torch.nn.RNN, LSTM or GRU, eager; on a GPU that is cuDNN, with `graph` replayed as a CUDA graph."""
    import torch

    shape, device = problem.shape, problem.device
    if device == "cuda" and not torch.cuda.is_available():
        raise NotApplicable("PyTorch finds no GPU or no driver")
    if device == "cpu" and problem.dtype not in ("float32", "float64"):
        raise NotApplicable(f"PyTorch is compared in {problem.dtype} on a GPU only")
    classes = _torch_classes()
    if shape.cell not in classes:
        raise NotApplicable(f"PyTorch has no {shape.cell}")
    torch.set_num_threads(threads())
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = problem.dtype == "tf32"
    number = {"float64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}.get(problem.dtype, torch.float32)
    on = {"device": device, "dtype": number}
    network = classes[shape.cell](
        shape.input_size, shape.hidden_size, shape.num_layers, bidirectional=shape.bidirectional
    ).to(**on)
    arrays = problem.arrays()
    x, upstream = (torch.from_numpy(array).to(**on) for array in arrays[:2])
    network.load_state_dict({name: torch.from_numpy(array) for name, array in problem.network().params.items()})
    if problem.scope == "step":
        return _torch_step(problem, network, x, torch.from_numpy(arrays[2]).to(device))
    network.train(problem.scope != "forward")  # or cuDNN would keep what only BPTT needs
    x.requires_grad_(problem.scope == "training")

    def forward() -> Any:
        with torch.inference_mode():
            return network(x)[0]

    def train() -> Any:
        network.zero_grad(set_to_none=True)
        x.grad = None
        output = network(x)[0]
        output.backward(upstream)
        return output

    work = forward if problem.scope == "forward" else train
    call = _cuda_graph(work) if graph else work

    def result() -> Results:
        output = {"output": call()}
        if problem.scope == "training":
            output |= {"x": x.grad} | {name: weight.grad for name, weight in network.named_parameters()}
        return {name: tensor.detach().double().cpu().numpy() for name, tensor in output.items()}

    return Run(call, result)


def train_torch(
    model: SequenceModel,
    task: Task,
    learning_rate: float,
    *,
    length: int | None,
    batch: int,
    updates: int,
    every: int,
    threshold: float,
    seed: int,
    evaluation: Callable[[SequenceModel], float],
) -> list[tuple[int, float]]:
    """Train PyTorch's network of the kind and size of `model` with its Adam, and return (updates, evaluation) by turns.

    It starts from PyTorch's own initial weights and takes the batches of `training.train` with this seed; before each
    evaluation, at every `every` updates, its parameters are copied into `model`. Raises NotApplicable for cells that
    PyTorch does not have, for several layers and for topologies that read their own outputs.
    """
    import torch

    net, functional = model.rnn, torch.nn.functional
    losses = {"cross_entropy": functional.cross_entropy, "mse": functional.mse_loss}
    plain = net.num_layers == 1 and not net.bidirectional and net.bias and not model.generates
    if net.cell.name not in _torch_classes() or model.loss_name not in losses or not plain:
        raise NotApplicable(
            "PyTorch is trained with one layer of RNN, LSTM or GRU in one direction, biases, inputs that are given and "
            f"one of the losses {', '.join(losses)}, got {model.loss_name}, {model.topology} of {net!r}"
        )
    torch.manual_seed(seed)
    layer = _torch_classes()[net.cell.name](net.input_size, net.hidden_size)
    parts = {"rnn": layer, "readout": torch.nn.Linear(net.hidden_size, model.output_size)}
    module = torch.nn.ModuleDict(parts).to(getattr(torch, net.dtype.name))
    optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate)
    T = len(task.arrays[0]) if task.arrays else check_steps(task, length)
    x, targets = np.zeros((T, batch, task.input_size), net.dtype), target_rows(task, T, batch, net.dtype)
    rng, lengths, found = generator(seed, "training"), np.full(batch, T), []
    order = np.zeros(1 + (task.arrays[0].shape[1] if task.arrays else 0), np.int64)
    for update in range(updates + 1):
        if update % every == 0:
            for name, tensor in module.named_parameters():
                model.params[name][...] = tensor.detach().numpy()  # also of a network that has diverged
            found.append((update, evaluation(model)))
        if update == updates:
            break
        task.generate(rng, x, targets, lengths, order, task.arrays)
        h, ends = module["rnn"](torch.from_numpy(x))[0], torch.from_numpy(lengths)
        within = torch.arange(T)[:, None] < ends
        h = h[within] if model.topology == "many_to_many" else h[ends - 1, torch.arange(batch)]
        wanted = torch.from_numpy(targets)
        wanted = wanted[within.reshape(-1)] if model.topology == "many_to_many" else wanted
        wanted = wanted[:, 0] if model.loss_name == "cross_entropy" else wanted
        optimiser.zero_grad(set_to_none=True)
        losses[model.loss_name](module["readout"](h), wanted).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), threshold)
        optimiser.step()
    return found


def _torch_step(problem: Problem, network: Any, x: Any, labels: Any) -> Run:
    import torch

    source = problem.model().params
    readout = torch.nn.Linear(problem.shape.hidden_size, CLASSES).to(x)
    readout.load_state_dict({name: torch.from_numpy(source[f"readout.{name}"]) for name in ("weight", "bias")})
    named = {f"rnn.{name}": weight for name, weight in network.named_parameters()}
    named |= {f"readout.{name}": weight for name, weight in readout.named_parameters()}
    optimiser = torch.optim.SGD(named.values(), lr=LEARNING_RATE)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(readout(network(x)[0][-1]), labels).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), THRESHOLD)
        optimiser.step()

    def checked() -> Results:
        for name, weight in named.items():
            weight.data.copy_(torch.from_numpy(source[name]))
        optimiser.param_groups[0]["lr"] = CHECKED_RATE
        step()
        optimiser.param_groups[0]["lr"] = LEARNING_RATE
        return {name: weight.detach().double().cpu().numpy() for name, weight in named.items()}

    return Run(step, checked)


def _cuda_graph(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return what replays `work`, and returns what that returned when it was captured, filled anew."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


# JAX ----------------------------------------------------------------------------------------------------------------


def _jax_step(cell: str) -> tuple[int, Callable[..., Any]]:
    """Return the number of states and the step of a scan: (state, W_hh, b_hh, ax) -> (state, h)."""
    import jax
    from jax import numpy as jnp

    def rnn(activation: Callable[..., Any], h: Any, weight: Any, bias: Any, ax: Any) -> Any:
        h = activation(ax + h @ weight.T + bias)
        return h, h

    def lstm(state: Any, weight: Any, bias: Any, ax: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(ax + h @ weight.T + bias, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def gru(h: Any, weight: Any, bias: Any, ax: Any) -> Any:
        x_r, x_z, x_n = jnp.split(ax, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(h @ weight.T + bias, 3, axis=-1)
        z = jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
        h = (1 - z) * n + z * h
        return h, h

    steps: dict[str, tuple[int, Callable[..., Any]]] = {
        "rnn_tanh": (1, partial(rnn, jnp.tanh)),
        "rnn_relu": (1, partial(rnn, jax.nn.relu)),
        "rnn_sigmoid": (1, partial(rnn, jax.nn.sigmoid)),
        "lstm": (2, lstm),
        "gru": (1, gru),
    }
    if cell not in steps:
        raise NotApplicable(f"the JAX peer has no {cell}")
    return steps[cell]


def _jax_cudnn(shape: Shape) -> Callable[[dict[str, Any], Any], Any]:
    """Return cuDNN's LSTM as JAX calls it: batch first, the parameters in one vector in our order, IEEE float32."""
    from jax import lax
    from jax import numpy as jnp
    from jax.experimental import rnn

    if shape.cell != "lstm":
        raise NotApplicable(f"JAX calls cuDNN for the LSTM only, not for {shape.cell}")
    start = np.zeros((1, shape.batch, shape.hidden_size), np.float32)
    lengths = np.full(shape.batch, shape.steps, np.int32)

    def forward(params: dict[str, Any], x: Any) -> Any:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        weights = jnp.concatenate([params[name].ravel() for name in names])
        sizes = shape.input_size, shape.hidden_size, 1, 0.0, False
        output = rnn.lstm(x.swapaxes(0, 1), start, start, weights, lengths, *sizes, precision=lax.Precision.HIGHEST)[0]
        return output.swapaxes(0, 1)

    return forward


def prepare_jax(problem: Problem, cudnn: bool = False) -> Run:
    """Prepare a jitted lax.scan, unrolled four steps, the product of all inputs hoisted; or cuDNN through JAX."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of a GPU from the others
    import jax
    from jax import lax
    from jax import numpy as jnp

    shape = problem.shape
    if problem.dtype != "float32" and (cudnn or problem.dtype != "float64"):
        raise NotApplicable(f"the JAX peer has no {problem.dtype}")
    if shape.num_layers != 1 or shape.bidirectional:
        raise NotApplicable("the JAX peer has one layer in one direction")
    try:
        device = jax.devices("gpu" if problem.device == "cuda" else "cpu")[0]
    except RuntimeError as error:
        raise NotApplicable(f"JAX has no device for {problem.device}: {error}") from error
    states, step = _jax_step(shape.cell)
    zero = np.zeros((shape.batch, shape.hidden_size), problem.dtype)

    def scan(params: dict[str, Any], x: Any) -> Any:
        ax = x @ params["weight_ih_l0"].T + params["bias_ih_l0"]
        weight, bias = params["weight_hh_l0"], params["bias_hh_l0"]
        start = zero if states == 1 else (zero, zero)
        return lax.scan(lambda state, row: step(state, weight, bias, row), start, ax, unroll=4)[1]

    forward = _jax_cudnn(shape) if cudnn else scan

    def train(params: dict[str, Any], x: Any, upstream: Any) -> Any:
        output, pullback = jax.vjp(forward, params, x)
        return output, *pullback(upstream)

    def loss(params: dict[str, Any], x: Any, labels: Any) -> Any:
        rnn = {name.removeprefix("rnn."): array for name, array in params.items()}
        logits = forward(rnn, x)[-1] @ params["readout.weight"].T + params["readout.bias"]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    def update(params: dict[str, Any], x: Any, labels: Any, learning_rate: Any) -> Any:
        gradients = jax.grad(loss)(params, x, labels)
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in gradients.values()))
        rate = learning_rate * jnp.minimum(1.0, THRESHOLD / norm)
        return {name: params[name] - rate * gradients[name] for name in params}

    exact = jax.default_matmul_precision("highest")  # a GPU would multiply float32 in TF32
    with jax.enable_x64(problem.dtype == "float64"), exact:
        x, upstream, labels = (jax.device_put(array, device) for array in problem.arrays())
        rates = [jax.device_put(np.asarray(rate, problem.dtype), device) for rate in (LEARNING_RATE, CHECKED_RATE)]
        source = problem.model().params if problem.scope == "step" else problem.network().params
        params = jax.device_put({name: np.array(array) for name, array in source.items()}, device)
        if problem.scope == "step":
            work, arguments = jax.jit(update), [params, x, labels, rates[0]]
        elif problem.scope == "training":
            work, arguments = jax.jit(train), [params, x, upstream]
        else:
            work, arguments = jax.jit(forward), [params, x]
        work = work.lower(*arguments).compile()

    def call() -> Any:
        done = jax.block_until_ready(work(*arguments))
        if problem.scope == "step":
            arguments[0] = done
        return done

    def result() -> Results:
        if problem.scope == "step":
            named = work(params, x, labels, rates[1])
        elif problem.scope == "training":
            output, gradients, dx = work(*arguments)
            named = {"output": output, **gradients, "x": dx}
        else:
            named = {"output": work(*arguments)}
        return {name: np.asarray(array, np.float64) for name, array in named.items()}

    return Run(call, result)


# ONNX Runtime -------------------------------------------------------------------------------------------------------

#: Our gate blocks in the order of ONNX, and the operator with its attributes.
_ONNX: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "rnn_tanh": ("RNN", [0], {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", [0], {"activations": ["Relu"]}),
    "rnn_sigmoid": ("RNN", [0], {"activations": ["Sigmoid"]}),
    "lstm": ("LSTM", [0, 3, 1, 2], {}),
    "gru": ("GRU", [1, 0, 2], {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", [1, 0, 2], {"linear_before_reset": 0}),
}


def prepare_onnxruntime(problem: Problem) -> Run:
    """Prepare one RNN, LSTM or GRU operator with its weights as initialisers; inference only."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    shape, H = problem.shape, problem.shape.hidden_size
    if problem.scope != "forward" or problem.dtype != "float32" or problem.device != "cpu":
        raise NotApplicable("the ONNX Runtime peer does inference in float32 on the CPU")
    if shape.cell not in _ONNX or shape.num_layers != 1 or shape.bidirectional:
        raise NotApplicable(f"the ONNX Runtime peer has one layer in one direction and no {shape.cell}")
    operator, order, attributes = _ONNX[shape.cell]

    def blocks(array: Array) -> Array:
        return np.concatenate([array[gate * H : (gate + 1) * H] for gate in order])

    params = problem.network().params
    bias = np.concatenate([blocks(params["bias_ih_l0"]), blocks(params["bias_hh_l0"])])
    weights = {"W": blocks(params["weight_ih_l0"]), "R": blocks(params["weight_hh_l0"]), "B": bias}
    graph = helper.make_graph(
        [helper.make_node(operator, ["X", "W", "R", "B"], ["Y"], hidden_size=H, **attributes)],
        "peer",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [shape.steps, shape.batch, shape.input_size])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [shape.steps, 1, shape.batch, H])],
        [numpy_helper.from_array(array[None], name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = onnxruntime.OrtValue.ortvalue_from_numpy(problem.arrays()[0])
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([shape.steps, 1, shape.batch, H], np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("X", x)
    binding.bind_ortvalue_output("Y", y)

    def result() -> Results:
        session.run_with_iobinding(binding)
        return {"output": y.numpy()[:, 0].astype(np.float64)}

    return Run(lambda: session.run_with_iobinding(binding), result)


#: Peers by name; cudnn is PyTorch's on a GPU, eager and as the replay of a CUDA graph; jax_cudnn is JAX's.
PEERS: dict[str, Peer] = {
    "torch": Peer(("torch",), ("cpu",), prepare_torch),
    "jax": Peer(("jax",), ("cpu", "cuda"), prepare_jax),
    "jax_cudnn": Peer(("jax",), ("cuda",), partial(prepare_jax, cudnn=True)),
    "onnxruntime": Peer(("onnx", "onnxruntime"), ("cpu",), prepare_onnxruntime),
    "cudnn": Peer(("torch",), ("cuda",), prepare_torch),
    "cudnn_graph": Peer(("torch",), ("cuda",), partial(prepare_torch, graph=True)),
}
