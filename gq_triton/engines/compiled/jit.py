"""How Numba compiles the loops of this engine."""

from functools import partial
from typing import Any

import numba
from numba import carray  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic

__all__ = ["exact", "sums", "vector"]

# No reassociation: (q - b) - s must be computed as written for a constant queue to be constant.
exact = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract", "nsz"})
sums = partial(numba.njit, nogil=True, error_model="numpy", fastmath=True)


@intrinsic
def _pointer(typing_context: Any, address: Any, like: Any) -> Any:
    """Return an address as a pointer to numbers of the type of ``like``."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(like)(address, like), code


@exact()
def vector(address, count, like):
    """Return the ``count`` numbers of the type of ``like`` from an address on."""
    return carray(_pointer(address, like), count)  # pyright: ignore[reportCallIssue]
