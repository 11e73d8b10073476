"""What mathematics predicts of gradients, to be drawn beside what is measured."""

import math

__all__ = ["forget_gate_rate"]


def forget_gate_rate(forget_bias: float) -> float:
    """Return the decay of dL/dc along an LSTM's cell state with W = 0: ln σ(b_f), nats per step.

    ∂c_t/∂c_{t−1} = f_t (Gers, Schmidhuber & Cummins 2000), and f_t = σ(b_f) where nothing else reaches the gate. As
    −ln(1 + e^−b), which does not cancel for a large bias.
    """
    if forget_bias < 0:
        return forget_bias - math.log1p(math.exp(forget_bias))
    return -math.log1p(math.exp(-forget_bias))
