"""Whether all numbers of an array are finite: what every input is asked before a kernel sees it."""

import numpy as np

from . import Array, threads
from .calls import borrow, job
from .compiling import cached
from .team import post, run_together, wait_until_done

__all__ = ["all_finite"]

#: All bits of the exponent are set in NaN and infinity, and in no other number.
_EXPONENTS = {4: np.uint32(0x7F800000), 8: np.uint64(0x7FF0000000000000)}

#: Bytes of an array that are worth a thread.
_SHARE = 2**19


@cached("alone")
def _any_full_exponent(bits, exponent):
    found = False
    for i in range(bits.size):
        found |= (bits[i] & exponent) == exponent
    return found


@cached("together")
def _look(arguments, counter, mails, parties, by_units, rank):
    """Set found[rank] to what `_any_full_exponent` says of the part of thread `rank` of `parties`."""
    arguments, counter, mails = borrow((arguments, counter, mails))
    post(mails, parties, rank, *job((arguments, counter, mails, parties, by_units)))
    bits, exponent, found = arguments
    found[rank] = _any_full_exponent(bits[len(bits) * rank // parties : len(bits) * (rank + 1) // parties], exponent)
    wait_until_done(mails, parties, rank)


def all_finite(value: Array) -> bool:
    """Return whether a contiguous float32 or float64 array holds no NaN and no infinity, in one pass over its bits."""
    exponent, parties = _EXPONENTS[value.itemsize], min(threads(), value.nbytes // _SHARE)
    bits = value.reshape(-1).view(type(exponent))
    if parties < 2:
        return not _any_full_exponent(bits, exponent)
    found = np.zeros(parties, np.bool_)
    run_together(_look, (bits, exponent, found), parties, False)
    return not found.any()
