"""Optimisers against their definitions in NumPy, and against PyTorch's."""

import numpy as np
import pytest

from rnnlab.optim import SGD, Adam, RMSprop

SETTINGS = {
    "sgd": SGD(0.1),
    "momentum": SGD(0.1, momentum=0.9),
    "rmsprop": RMSprop(0.01, decay=0.9, epsilon=1e-6),
    "adam": Adam(0.01, beta1=0.8, beta2=0.95, epsilon=1e-7),
}


def textbook(name, weights, gradients):
    """Each as its paper has it; yields the weights after every step."""
    w, first, second = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
    for t, g in enumerate(gradients, 1):
        if name in ("sgd", "momentum"):
            first = (0.9 if name == "momentum" else 0.0) * first + g
            w = w - 0.1 * first
        elif name == "rmsprop":
            second = 0.9 * second + 0.1 * g**2
            w = w - 0.01 * g / (np.sqrt(second) + 1e-6)
        else:
            first, second = 0.8 * first + 0.2 * g, 0.95 * second + 0.05 * g**2
            w = w - 0.01 * (first / (1 - 0.8**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-7)
        yield w


def run(optimiser, weights, gradients):
    w, state = weights.copy(), np.zeros((optimiser.rows, len(weights)), weights.dtype)
    for t, g in enumerate(gradients, 1):
        optimiser.update(w, g.astype(w.dtype), state, t)
        yield w.copy()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-14), ("float32", 5e-6)])
@pytest.mark.parametrize("name", SETTINGS)
def test_updates_are_those_of_the_definition(name, dtype, tolerance):
    """A step rounds numbers around one a few times: 20 steps of at most 20 half-ulps, of 1.1e-16 or 6e-8."""
    rng = np.random.default_rng(0)
    weights, gradients = rng.normal(size=37).astype(dtype), rng.normal(size=(20, 37))
    for got, want in zip(
        run(SETTINGS[name], weights, gradients), textbook(name, weights.astype("float64"), gradients), strict=True
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_updates_are_pytorchs(name):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    weights, gradients = rng.normal(size=37), rng.normal(size=(20, 37)) * 10.0 ** rng.integers(-8, 3, size=(20, 37))
    theirs = torch.tensor(weights.copy(), requires_grad=True)
    make = {
        "sgd": lambda: torch.optim.SGD([theirs], 0.1),
        "momentum": lambda: torch.optim.SGD([theirs], 0.1, momentum=0.9),
        "rmsprop": lambda: torch.optim.RMSprop([theirs], 0.01, alpha=0.9, eps=1e-6),
        "adam": lambda: torch.optim.Adam([theirs], 0.01, betas=(0.8, 0.95), eps=1e-7),
    }
    peer = make[name]()
    for got, gradient in zip(run(SETTINGS[name], weights, gradients), gradients, strict=True):
        theirs.grad = torch.tensor(gradient)
        peer.step()
        # The same few roundings in another order, of weights that gradients of up to 100 move to some 100.
        np.testing.assert_allclose(got, theirs.detach().numpy(), rtol=1e-13, atol=1e-14)


def test_defaults_are_pytorchs():
    torch = pytest.importorskip("torch")
    parameter = [torch.zeros(1, requires_grad=True)]
    rmsprop, adam = (optimiser(parameter, 0.1).defaults for optimiser in (torch.optim.RMSprop, torch.optim.Adam))
    assert RMSprop(0.1) == RMSprop(0.1, rmsprop["alpha"], rmsprop["eps"])
    assert Adam(0.1) == Adam(0.1, *adam["betas"], adam["eps"])


def test_bad_settings_are_named():
    for make, message in (
        (lambda: SGD(-0.1), r"learning_rate must be a finite number in \[0, inf\), got -0.1"),
        (lambda: SGD(0.1, momentum=1.0), r"momentum must be a finite number in \[0, 1\), got 1.0"),
        (lambda: RMSprop(0.1, decay=2), "decay must be"),
        (lambda: Adam(float("nan")), "learning_rate must be"),
        (lambda: Adam(0.1, beta2=1), "beta2 must be"),
        (lambda: Adam(0.1, epsilon=-1), "epsilon must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
