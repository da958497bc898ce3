# pyright: basic
"""The order of a batch by cluster and the clusters' numbers, against loops in float64."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE

from gq_triton import kernels
from gq_triton.engines import eager
from gq_triton.grouping import Groups
from gq_triton.options import ClusterOptions

F64 = torch.float64
ENGINES = {"eager": eager, "kernels": kernels}


def oracle(labels, clusters, weights, whole, steps, power, unit, standard_error):
    """Return order, offsets and the three numbers of each cluster and of the batch as one."""
    labels = labels.tolist()
    order = [b for k in range(clusters) for b in range(len(labels)) if labels[b] == k]
    ends = [sum(label < k for label in labels) for k in range(clusters + 1)]
    n = [
        sum(1.0 if weights is None else float(weights[b]) for b in order[begin:end])
        for begin, end in itertools.pairwise(ends)
    ]
    sizes = [end - begin for begin, end in itertools.pairwise(ends)]
    total = sum(n)
    mass = sum(number**power for number, size in zip(n, sizes, strict=True) if size)
    rows = []
    for number, size in [*zip(n, sizes, strict=True), (total, len(labels))]:
        powered = number**power if size else 0.0
        inverse = total * steps / (number * unit) if size and number else 0.0
        scale = (whole * steps / max(size, 1)) ** 0.5 if standard_error else 1.0
        rows.append((inverse, powered, scale))
    table = [[inverse, powered / mass / steps * unit, scale] for inverse, powered, scale in rows]
    table[-1][1] = unit / steps
    return order, ends, torch.tensor(table, dtype=F64), (mass, total, rows[-1][1])


CASES = {
    "one sample": ([0], 1, {}),
    "empty clusters": ([3, 1, 3, 3, 1, 0], 5, {}),
    "a cluster per sample": ([4, 2, 0, 1, 3], 5, {"power": 0.5}),
    "more clusters than a tile": (list(range(69, -1, -2)), 70, {"steps": 3}),
    "more samples than a tile": ([(7 * b) % 11 for b in range(600)], 11, {"power": 0.25}),
    "equal weight of clusters": ([0, 2, 2, 2], 3, {"power": 0.0, "unit": 4.0}),
    "weights": ([1, 0, 2, 1, 1], 4, {"weights": [0.5, 0.0, 2.0, 1.0, 0.25], "power": 2.0}),
    "standard error": ([1, 0, 1, 1], 3, {"standard_error": True, "whole": 9, "steps": 2}),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_groups_equal_the_loops(engine, name, tensor):
    labels, clusters, given = CASES[name]
    options = {"whole": len(labels), "steps": 1, "power": 1.0, "unit": 1.0} | given
    weights = given.get("weights")
    whole, standard_error = options["whole"], given.get("standard_error", False)
    labels = torch.tensor(labels, device=DEVICE)
    order, offsets, table = ENGINES[engine].group(
        labels, clusters, steps=options["steps"], power=options["power"], unit=options["unit"],
        sample_weights=None if weights is None else torch.tensor(weights, device=DEVICE),
        whole_batch=torch.tensor(float(whole), dtype=F64, device=DEVICE) if tensor else whole,
        standard_error=standard_error,
    )  # fmt: skip
    numbers = options["steps"], options["power"], options["unit"], standard_error
    expected = oracle(labels, clusters, weights, whole, *numbers)
    assert order.tolist() == expected[0]
    assert offsets.tolist() == expected[1]
    assert order.dtype == offsets.dtype == torch.int64
    assert table.shape[0] == 8
    assert table.shape[1] % 2 == 0
    table = table.cpu()
    beside = torch.stack([table[3, 0], table[3, 1], table[7, 0]])
    for actual, right in (
        (table[:3, :clusters].T, expected[2][:-1]),
        (table[4:7, 0], expected[2][-1]),
        (beside, torch.tensor(expected[3], dtype=F64)),
    ):
        torch.testing.assert_close(actual, right, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("whole", [None, 9, torch.tensor(9.0)])
def test_groups_of_a_device_read_nothing(backend, whole, monkeypatch):
    """The device ``meta`` stands for a GPU: it has no values that the host could read."""
    if backend == "triton":
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kwargs: None)
    labels = torch.zeros(6, dtype=torch.int64, device="meta")
    options = ClusterOptions(
        n_clusters=3, features="", population_power=0.5, centroid_scale="standard_error"
    )
    whole = whole.to("meta") if isinstance(whole, torch.Tensor) else whole
    groups = Groups.of(labels, 3, options, torch.ones(6, device="meta"), whole, backend)
    for one in (groups, groups.whole, groups.unknown, groups.per_row(12)):
        used = one.order, one.offsets, one.members, one.mass, one.one_cluster, *one.rows(2)
        assert all(tensor.device.type == "meta" for tensor in used)


def test_a_problem_is_raised_where_the_sizes_are_read():
    labels, options = torch.tensor([0, 1, 1], device=DEVICE), ClusterOptions()
    flag = torch.tensor(False, device=DEVICE)
    fine = Groups.of(labels, 2, options, problem=(flag, "labels must fit"))
    assert fine.sizes == [1, 2]
    wrong = Groups.of(labels, 2, options, problem=(~flag, "labels must fit"))
    with pytest.raises(ValueError, match="labels must fit"):
        _ = wrong.sizes


def test_wrong_labels_are_refused():
    given: dict[str, Any] = {"sample_weights": None, "whole_batch": 3, "steps": 1, "power": 1.0}
    given |= {"unit": 1.0, "standard_error": False}
    with pytest.raises(ValueError, match=r"labels must have shape \(B,\), got \(3, 1\)"):
        kernels.group(torch.zeros(3, 1).long(), 2, **given)
    with pytest.raises(ValueError, match=r"labels must be int64, got torch.int32"):
        kernels.group(torch.zeros(3).int(), 2, **given)
