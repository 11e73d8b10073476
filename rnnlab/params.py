"""Named weights: shapes, counts, and initialisers with their sources."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .cells import Cell
from .checks import check_array, check_choice, check_integer, check_number
from .kernels import Array

__all__ = ["INITIALISERS", "Params", "initialise", "layer_shapes"]

Shape = tuple[int, ...]


class Params(Mapping[str, Array]):
    """An ordered mapping from names to arrays of `shapes`, which all live in one flat buffer, `flat`.

    Assigning copies into the buffer: `params["bias_hh_l0"] = values` raises TypeError for another dtype and ValueError
    for another shape or a number that is not finite. The arrays may also be written in place.
    """

    def __init__(self, shapes: Mapping[str, Shape], dtype: np.dtype[Any]) -> None:
        self.shapes = dict(shapes)
        ends = list(itertools.accumulate(map(math.prod, shapes.values()), initial=0))
        self.flat: Array = np.zeros(ends[-1], dtype)
        self._arrays = {
            name: self.flat[start:end].reshape(shape)
            for (name, shape), start, end in zip(shapes.items(), ends, ends[1:], strict=False)
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"shapes": self.shapes, "flat": self.flat.copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["shapes"], state["flat"].dtype)  # type: ignore[misc]
        self.flat[...] = state["flat"]  # a copy is views of one buffer again

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __setitem__(self, name: str, value: Array) -> None:
        if name not in self._arrays:
            raise KeyError(f"{name!r} is no parameter of this network; it has {', '.join(self)}")
        target = self._arrays[name]
        target[...] = check_array(f"params[{name!r}]", value, target.shape, self.flat.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"Params({', '.join(f'{name}: {shape}' for name, shape in self.shapes.items())})"

    @classmethod
    def join(cls, parts: Mapping[str, "Params"]) -> "Params":
        """Return one `Params` with names `part.name`; the parts move into its buffer and stay in step with it.

        Raises ValueError for a part that lives in another buffer already, which it would leave behind.
        """
        if taken := [part for part, params in parts.items() if params.flat.base is not None]:
            raise ValueError(f"{taken[0]} already belongs to a model; build a new one for this")
        shapes = {f"{part}.{name}": array.shape for part, params in parts.items() for name, array in params.items()}
        joined = cls(shapes, next(iter(parts.values())).flat.dtype)
        start = 0
        for part, params in parts.items():
            block = joined.flat[start : start + params.flat.size]
            block[...] = params.flat
            params.flat = block
            params._arrays = {name: joined[f"{part}.{name}"] for name in params}
            start += block.size
        return joined

    def like(self) -> "Params":
        """Return parameters of the same names and shapes, all zero."""
        return Params(self.shapes, self.flat.dtype)


def layer_shapes(cell: Cell, input_size: int, hidden_size: int, bias: bool = True) -> dict[str, Shape]:
    """Return the shapes of one layer in one direction, in PyTorch's names and order, peepholes last.

    Two biases, as PyTorch and cuDNN count: G·H·(I + H + 2) + P·H numbers in all.
    """
    rows = len(cell.gates) * hidden_size
    shapes: dict[str, Shape] = {"weight_ih": (rows, input_size), "weight_hh": (rows, hidden_size)}
    if bias:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    if cell.peepholes:
        shapes["peephole"] = (len(cell.peepholes) * hidden_size,)
    return shapes


# Initialisers: (rng, rows, columns, hidden_size) -> one gate's block, at gain 1 --------------------------------------

Initialiser = Callable[[np.random.Generator, int, int, int], Array]


def uniform(rng: np.random.Generator, rows: int, columns: int, hidden_size: int) -> Array:
    """U(−1/√H, 1/√H), the default of torch.nn.RNN, LSTM and GRU."""
    bound = 1 / math.sqrt(hidden_size)
    return rng.uniform(-bound, bound, (rows, columns))


def glorot(rng: np.random.Generator, rows: int, columns: int, hidden_size: int) -> Array:
    """U(−a, a), a = √(6 / (rows + columns)): Glorot & Bengio (2010), eq. 16."""
    bound = math.sqrt(6 / (rows + columns))
    return rng.uniform(-bound, bound, (rows, columns))


def orthogonal(rng: np.random.Generator, rows: int, columns: int, hidden_size: int) -> Array:
    """A Haar-distributed matrix with orthonormal rows or columns: Saxe, McClelland & Ganguli (2014)."""
    q, r = np.linalg.qr(rng.normal(size=(max(rows, columns), min(rows, columns))))
    q *= np.sign(np.diag(r))  # without it QR's sign convention would bias the distribution
    return q if rows >= columns else q.T


def identity(rng: np.random.Generator, rows: int, columns: int, hidden_size: int) -> Array:
    """The identity: the IRNN of Le, Jaitly & Hinton (2015)."""
    return np.eye(rows, columns)


def gaussian(rng: np.random.Generator, rows: int, columns: int, hidden_size: int) -> Array:
    """N(0, 1/columns): with gain g the random network of Sompolinsky, Crisanti & Sommers (1988)."""
    return rng.normal(0, 1 / math.sqrt(columns), (rows, columns))


def sparse(rng: np.random.Generator, rows: int, columns: int, hidden_size: int) -> Array:
    """15 non-zeros a unit from N(0, 0.01²); W_hh is then rescaled to spectral radius 0.95.

    The "smart tanh" of Pascanu, Mikolov & Bengio (2013), sec. 4.1.
    """
    weight = rng.normal(0, 0.01, (rows, columns))
    keep = min(15, columns)
    for row in weight:
        row[rng.permutation(columns)[keep:]] = 0
    return weight


def zeros(rng: np.random.Generator, rows: int, columns: int, hidden_size: int) -> Array:
    """All zero."""
    return np.zeros((rows, columns))


#: Initialisers by name; each makes the block of one gate.
INITIALISERS: dict[str, Initialiser] = {
    function.__name__: function for function in (uniform, glorot, orthogonal, identity, gaussian, sparse, zeros)
}


def initialise(
    layers: list[dict[str, Array]],
    cell: Cell,
    *,
    recurrent: str,
    input: str,
    bias: str,
    gain: float,
    forget_bias: float | None,
    chrono: int | None,
    rng: np.random.Generator,
) -> None:
    """Fill the weights of every layer-direction; the arguments are those of `Recurrent.initialise`."""
    check_choice("recurrent", recurrent, INITIALISERS)
    check_choice("input", input, INITIALISERS)
    check_choice("bias", bias, ("uniform", "zeros"))
    check_number("gain", gain, 0, math.inf, above=True)
    if forget_bias is not None:
        check_number("forget_bias", forget_bias, -math.inf, math.inf)
    keeps = next((gate for gate in cell.gates if gate in "fz"), None)
    for name, value in (("forget_bias", forget_bias), ("chrono", chrono)):
        if value is not None and (keeps is None or "bias_ih" not in layers[0]):
            raise ValueError(f"{name} needs a cell with a forget or update gate and biases, got {cell.name!r}")
    if forget_bias is not None and chrono is not None:
        raise ValueError("forget_bias and chrono set the same bias: give one of them")
    if chrono is not None and check_integer("chrono", chrono) < 3:
        raise ValueError(f"chrono must be a longest dependency of at least 3 steps, got {chrono!r}")
    for layer in layers:
        hidden_size = layer["weight_hh"].shape[1]
        for name, array in layer.items():
            blocks = array.reshape(-1, hidden_size, *array.shape[1:])
            for block in blocks:
                if name == "weight_hh":
                    drawn = INITIALISERS[recurrent](rng, hidden_size, hidden_size, hidden_size)
                    if recurrent == "sparse":
                        drawn *= 0.95 / np.abs(np.linalg.eigvals(drawn)).max()
                    block[...] = gain * drawn
                elif name == "weight_ih":
                    block[...] = INITIALISERS[input](rng, hidden_size, block.shape[1], hidden_size)
                else:
                    block[...] = INITIALISERS[bias](rng, 1, hidden_size, hidden_size)[0]
        gate = {name: slice(k * hidden_size, (k + 1) * hidden_size) for k, name in enumerate(cell.gates)}
        if keeps is not None and forget_bias is not None:
            layer["bias_ih"][gate[keeps]], layer["bias_hh"][gate[keeps]] = forget_bias, 0
        if keeps is not None and chrono is not None:
            # Tallec & Ollivier (2018), sec. 2: b_f = log U(1, T_max − 1), b_i = −b_f spread time scales up to T_max.
            time_scale = np.log(rng.uniform(1, chrono - 1, hidden_size))
            layer["bias_ih"][gate[keeps]], layer["bias_hh"][gate[keeps]] = time_scale, 0
            if "i" in gate:
                layer["bias_ih"][gate["i"]], layer["bias_hh"][gate["i"]] = -time_scale, 0
