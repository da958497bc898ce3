"""What a step launches and what the host waits for, on the meta device: no GPU is needed.

``python tests/helpers/meta_steps.py`` prints where the launches come from.
"""

import ast
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_cases import INTERPRETED
from meta_steps import budget, next_symbol, step_of, text_case, watched, watching

import gq_triton
from gq_triton import GQSGD, GQAdamW
from gq_triton.engines.eager.weight_grad import product_into

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Kernels are compiled here, for CUDA.")

# Launches of a clustered step beyond those of the plain step, K = 8: each operation counted once,
# and with two for an operation of torch that launches two kernels. They may only become fewer; the
# aim is 12. A change that saves launches lowers its numbers here.
BEYOND = {"tiny GPT": (7, 2), "GPT-2 small": (3, -22), "ResNet-18": (30, 11)}
# What a clustered step still reads of the device, and what it still sends there: functions and
# operations. The aim is nothing. Whoever removes one takes it from the list.
READS: set[str] = set()
COPIES: set[str] = set()


@pytest.mark.slow
def test_launches_reads_and_copies_of_a_step():
    reads, copies = set(), set()
    for case, (operations, kernels) in BEYOND.items():
        plain, ours = budget(case)
        assert ours.total - plain.total <= operations, case
        assert ours.kernels - plain.kernels <= kernels, case
        assert not plain.reads, case
        reads |= ours.reads.keys()
        copies |= ours.copies.keys()
    assert reads == READS
    assert copies == COPIES


def small(vocabulary=16, length=8):
    """Return a decoder of one block; no more tokens are looked up than the table has rows."""
    return text_case(1, 16, 2, vocabulary, 4, length)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(GQSGD, {"momentum": 0.9}), (GQAdamW, {}), (GQAdamW, {"match_norm": True}),
     (GQAdamW, {"queue_dtype": torch.bfloat16})],
)  # fmt: skip
def test_optimizers_launch_little_and_have_the_host_wait_for_nothing(kind, options):
    """Flags of all gradients are made and cleared; the update counts its own steps."""
    model, batch, loss, _ = small()
    optimizer = kind(model.parameters(), lr=1e-3, backend="triton", **options)
    step = watched(step_of(model, batch, loss, optimizer=optimizer))
    assert not step.reads
    assert not step.copies
    if "match_norm" in options:
        return
    name = kind.__name__.lower()
    own = {place: n for place, n in step.launches.items() if place != "the model"}
    update = f"kernels/{name.removeprefix('gq')}.py:{name}_"
    assert own == {"kernels/finite.py:all_finite": 2, update: 1}


@pytest.mark.parametrize("options", [{}, {"match_norm": True}, {"queue_dtype": torch.bfloat16}])
def test_the_plug_in_has_the_host_wait_for_nothing(options):
    model, batch, loss, _ = small()
    step = watched(step_of(model, batch, loss, rho=2.0, **options))
    assert not step.reads
    assert not step.copies


@pytest.mark.parametrize(
    "options",
    [{}, {"match_norm": True}, {"centroid_scale": "standard_error", "population_power": 0.5}],
)
def test_reads_of_clusters(options):
    model, batch, loss, features = small()
    step = watched(step_of(model, batch, loss, n_clusters=2, features=features, **options))
    assert set(step.reads) <= READS
    assert set(step.copies) <= COPIES


class Tables(torch.nn.Module):
    """A tied table, and one of positions with more rows than any batch has."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(9, 4), torch.nn.Embedding(20, 4)
        self.features, self.head = torch.nn.LayerNorm(4), torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.features(self.tokens(tokens) + self.positions(places)))


def test_rows_of_tables_are_added_up_in_one_order(monkeypatch):
    """``index_add_`` would add in the order of arrival, and ``unique`` have the host wait."""

    def refuse(*args):
        raise AssertionError("no order")

    with torch.device("meta"):
        model, symbols = Tables(), torch.zeros(4, 8, dtype=torch.int64)
    step = step_of(model, (symbols, symbols), next_symbol, n_clusters=2, features="features")
    monkeypatch.setattr(torch.Tensor, "index_add_", refuse)
    seen = watched(step)
    assert not seen.reads
    assert seen.launches["cluster_grad/layers/rows.py:add_rows_"] == 2


def zeroing(model):
    """Return an optimizer that zeroes gradients in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)
    return optimizer


def test_gradients_that_are_zeroed_in_place():
    model, batch, loss, features = small()
    options = {"n_clusters": 2, "features": features}
    step = watched(step_of(model, batch, loss, optimizer=zeroing(model), **options))
    assert set(step.reads) <= READS


@pytest.mark.slow
def test_gradients_that_are_dropped_in_place():
    """Without a step between two backward passes, ``p.grad`` is read to tell zeroed from kept."""
    model, batch, loss, features = small()
    optimizer = zeroing(model)
    step = step_of(model, batch, loss, optimizer=optimizer, n_clusters=2, features=features)

    def twice():
        loss(model(batch[0]), batch[1]).backward()
        step()

    reads = set(watched(twice, settle=1).reads)
    assert reads - READS == {"cluster_grad/raw.py:note _local_scalar_dense"}


@pytest.mark.skipif(
    torch.__version__.startswith("2.8"), reason="its meta device has no product in a wider type"
)
def test_a_product_of_narrow_factors_is_written_at_once():
    """A product in float32 of factors in bfloat16 needs no copy to its place."""
    factors = torch.zeros(2, 4, 3, dtype=torch.bfloat16, device="meta")
    with watching() as watch:
        product_into(torch.empty(3, 3, device="meta"), *factors)
    assert watch.total == 1


# In the source of a step: what makes the host wait, or what a captured graph cannot replay.
WAITS = {"cpu", "Event", "item", "nonzero", "pin_memory", "tolist", "unique"}
ALLOWED = {
    # Labels of a user's clusterer on the CPU; sizes where somebody asks for them; saved states.
    ("cluster_grad/labeller.py", "tolist"),
    ("cluster_grad/kmeans_state.py", "tolist"),
    ("grouping/groups.py", "tolist"),
    ("grouping/kmeans.py", "cpu"),
    ("queues/measures.py", "tolist"),
    ("queues/saved.py", "cpu"),
    # Tables of addresses are copied where they are new; a captured graph keeps their source.
    ("kernels/launch.py", "pin_memory"),
    # Of such a source.
    ("kernels/combine_all.py", "tolist"),
    # On the CPU.
    ("cluster_grad/layers/embedding.py", "unique"),
    ("cluster_grad/standins/meet.py", "unique"),
}


def test_the_source_of_a_step_waits_for_nothing():
    package = Path(gq_triton.__file__).parent
    found = set()
    for folder in ("cluster_grad", "grouping", "kernels", "queues"):
        for file in (package / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                words = {keyword.arg for keyword in node.keywords}
                words |= {node.func.attr} if isinstance(node.func, ast.Attribute) else set()
                found |= {(str(file.relative_to(package)), word) for word in words & WAITS}
    assert found == ALLOWED


def test_a_default_device_leaves_tokens_on_the_host():
    """``int(token)`` of a tensor on the device would wait for it, in every layer."""
    model, batch, loss, features = small()
    with torch.device("meta"):  # as torch.set_default_device, which torch 2.8 cannot undo
        step = step_of(model, batch, loss, n_clusters=2, features=features)
        assert set(watched(step).reads) <= READS
