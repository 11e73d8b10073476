"""Closed forms."""

import mpmath
import pytest

from rnnlab.theory import forget_gate_rate


@pytest.mark.parametrize("bias", [-800.0, -1.0, 0.0, 1.0, 2.0, 5.0, 40.0, 800.0])
def test_forget_gate_rate_is_the_log_of_the_gate(bias):
    with mpmath.workdps(400):
        expected = float(mpmath.log(1 / (1 + mpmath.exp(-mpmath.mpf(bias)))))
    assert forget_gate_rate(bias) == pytest.approx(expected, rel=1e-14, abs=0)
