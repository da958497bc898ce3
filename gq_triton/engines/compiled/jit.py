"""How Numba compiles the loops of this engine."""

from functools import partial

import numba

__all__ = ["exact", "sums"]

# No reassociation: (q - b) - s must be computed as written for a constant queue to be constant.
exact = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
sums = partial(numba.njit, nogil=True, error_model="numpy", fastmath=True)
