"""`all_finite`: the search for NaN and infinity in many tensors."""

import math

import pytest
import torch
from kernel_cases import DEVICES, QUIET, Guarded

from gq_triton.kernels import all_finite
from gq_triton.kernels.launch import CHUNK, block_size

BLOCK = block_size(torch.float32, most=8)
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1)
pytestmark = [pytest.mark.parametrize("device", DEVICES), *QUIET]


@pytest.mark.parametrize("shift", [0, 1])
def test_finite_tensors_of_all_sizes(device, shift):
    guarded = Guarded(device, shift)
    assert all_finite(guarded.lists(SIZES)).tolist() == [True] * len(SIZES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_only_the_tensor_with_a_bad_element_is_flagged(device, dtype, value):
    grads = Guarded(device).lists((5, BLOCK + 3, 7), dtype=dtype)
    grads[1][-1] = value
    flags = all_finite(grads)
    assert flags.dtype == torch.bool
    assert flags.tolist() == [True, False, True]


@pytest.mark.parametrize("position", [0, BLOCK, CHUNK - 1, CHUNK, 2 * CHUNK + 4])
def test_a_bad_element_is_found_in_every_chunk(device, position):
    grads = Guarded(device).lists((2 * CHUNK + 5, 3))
    grads[0][position] = math.nan
    assert all_finite(grads).tolist() == [False, True]


def test_largest_numbers_are_finite(device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        grad = torch.full((9,), torch.finfo(dtype).max, dtype=dtype, device=device)
        assert all_finite([grad, -grad]).all()


def test_new_contents_and_new_addresses_are_seen(device):
    grads = Guarded(device).lists((4, 4))
    assert all_finite(grads).all()
    grads[0][2] = math.inf
    assert all_finite(grads).tolist() == [False, True]
    assert all_finite(grads[::-1]).tolist() == [True, False]


def test_no_tensors(device):
    assert all_finite([]).shape == (0,)


def test_wrong_inputs_are_named(device):
    with pytest.raises(ValueError, match=r"grads\[0\] must be flat and contiguous"):
        all_finite([torch.zeros(2, 3, device=device)])
    with pytest.raises(ValueError, match=r"grads\[1\] is torch.float64"):
        all_finite([torch.zeros(2, device=device), torch.zeros(2, device=device).double()])
