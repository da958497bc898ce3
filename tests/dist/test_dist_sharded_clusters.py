# Gradients are there after a backward pass, and what the ranks hold are DTensors.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false
"""Clusters of every rank on FSDP2 and HSDP: W ranks are one process with all their clusters."""

from typing import Any

import pytest
import torch
from sharded_cluster_cases import CLUSTERS, Images, Twins, Words, group_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gq_triton import GradQueue
from gq_triton.engines import engine

pytestmark = pytest.mark.slow

UNEVEN = [6, 9, 4, 7]
CASES = {
    "plain": {},
    "words": {"model": Words},
    "match_norm": {"options": {"match_norm": True, "queue_dtype": "float8"}},
    "uneven": {"sizes": UNEVEN},
    "uneven_power": {"sizes": UNEVEN, "options": {"population_power": 0.5}},
    "uneven_standard_error": {"sizes": UNEVEN, "options": {"centroid_scale": "standard_error"}},
    "uneven_brought": {"sizes": UNEVEN, "brings": True},
    "kept_whole": {"model": Words, "sharding": {"reshard_after_forward": False}},
}


def full(tensor) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(rank, shape, case):
    case = dict(case)
    if "sizes" in case:
        case["sizes"] = case["sizes"][: torch.Size(shape).numel()]
    twins = Twins(rank, shape, **case)
    before = list(twins.sharded.state_dict()), len(list(twins.sharded.parameters()))
    twins.run()
    assert before == (list(twins.sharded.state_dict()), len(list(twins.sharded.parameters())))
    assert twins.plain.metrics()["mean_weight"] != 1


# What the gate takes on each number of ranks. Cases with more options go where plain ones would.
IN_GATE = {
    "two": {"words", "uneven_power"},
    "three": {"match_norm", "uneven_brought"},
    "hsdp": CASES.keys() - {"plain", "uneven"},
}
GRID = [
    pytest.param(
        shape, case, id=f"{kind}-{name}",
        marks=[] if name in IN_GATE[kind] else pytest.mark.rare,
    )
    for kind, shape in (("two", (2,)), ("three", (3,)), ("hsdp", (2, 2)))
    for name, case in CASES.items()
]  # fmt: skip


@pytest.mark.parametrize(("shape", "case"), GRID)
def test_ranks_are_one_process(ranks, shape, case):
    ranks(torch.Size(shape).numel()).run(check, shape, case)


def check_accumulation(rank, shape, synced):
    """Three micro-batches; those before the last are reduced, or wait for the last."""
    twins = Twins(rank, shape, model=Words, options={"accumulation_steps": 3})
    for step in range(5):
        twins.zero_grad()
        for micro in range(3):
            twins.sharded.set_requires_gradient_sync(synced or micro == 2)
            twins.backward(10 * step + micro, scale=1 / 3)
        twins.assert_same()
        twins.step()
        # One process has the norms of the last micro-batch, several have those of the step.
        twins.assert_same_metrics(but=["norm_ratio"])


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["fsdp", "hsdp"])
def test_micro_batches_are_those_of_one_process(ranks, shape, synced):
    ranks(torch.Size(shape).numel()).run(check_accumulation, shape, synced)


def check_undeclared(rank):
    twins = Twins(rank, (2,))
    twins.zero_grad()
    for micro in range(2):
        twins.sharded.set_requires_gradient_sync(micro == 1)
        twins.loss(twins.sharded, twins.batch(micro, rank)).backward()
    with pytest.warns(UserWarning, match="2 backward passes have made this step's gradient"):
        twins.optimizer.step()


def test_micro_batches_that_were_not_declared_are_told(ranks):
    ranks(2).run(check_undeclared)


def check_partial_reduction(rank):
    """Gradients that are reduced over the shards only, and over the copies with the last one."""
    twins = Twins(rank, (2, 2), options={"accumulation_steps": 2})
    for step in range(5):
        twins.zero_grad()
        for micro in range(2):
            twins.sharded.set_requires_all_reduce(micro == 1)
            twins.backward(10 * step + micro, scale=1 / 2)
        twins.assert_same()
        twins.step()


def test_copies_may_be_reduced_later(ranks):
    ranks(4).run(check_partial_reduction)


def check_zeroed_in_place(rank):
    twins = Twins(rank, (2,))
    for step in range(6):
        twins.zero_grad(set_to_none=False)
        twins.backward(step)
        twins.assert_same()
        models = twins.sharded, twins.whole
        grads = [[param.grad for param in model.parameters()] for model in models]
        norms = [full(torch.nn.utils.get_total_norm(mine)) for mine in grads]
        torch.testing.assert_close(*norms, rtol=1e-10, atol=0)
        for model, norm in zip(models, norms, strict=True):
            # clip_grad_norm_ of torch 2.8 adds its 1e-6 to the norm on one rank, not to the whole.
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.1, norm)
        twins.assert_same()
        twins.step()
        twins.assert_same_metrics()


def test_gradients_zeroed_in_place_and_clipped(ranks):
    ranks(2).run(check_zeroed_in_place)


def wrap_blocks(model):
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    for place in (1, 3):
        model.blocks[1][place] = checkpoint_wrapper(model.blocks[1][place])


def check_checkpointed(rank):
    Twins(rank, (2,), model=Words, wrap=wrap_blocks).run()


def test_activation_checkpointing(ranks):
    ranks(2).run(check_checkpointed)


def last_dimension(param):
    return Shard(param.dim() - 1) if param.shape[-1] % 2 == 0 else None


def check_last_dimension(rank):
    Twins(rank, (2,), model=Words, sharding={"shard_placement_fn": last_dimension}).run()


def test_parameters_cut_along_another_dimension(ranks):
    ranks(2).run(check_last_dimension)


def check_output_gradient(rank):
    Twins(rank, (2,), options={"features": "output_gradient"}).run()


def test_features_that_the_backward_pass_gives(ranks):
    ranks(2).run(check_output_gradient)


def saved(twins):
    model, optimizer = get_state_dict(twins.sharded, twins.optimizer)
    return {"model": model, "optimizer": optimizer, "queue": twins.queue}


def save_run(rank, shape, folder):
    twins = Twins(rank, shape, sizes=[6, 6, 4, 4][: torch.Size(shape).numel()])
    twins.run(steps=4)
    save(saved(twins), checkpoint_id=folder)


def load_run(rank, shape, sizes, folder):
    """Go on with another mesh; compare with one process that has seen the same samples."""
    twins = Twins(rank, shape, sizes=sizes)
    state = saved(twins)
    load(state, checkpoint_id=folder)
    set_state_dict(
        twins.sharded,
        twins.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    assert all(int(n) == 4 for n in twins.queue.state_dict()["queued"].values())
    with torch.no_grad():
        for _, one, other in twins.pairs():
            other.copy_(full(one))
            # The other process starts from the queue and the momentum of this one.
            twins.other.state[other]["momentum_buffer"] = full(
                twins.optimizer.state[one]["momentum_buffer"]
            )
    mine = twins.queue.state_dict()
    whole = {**mine, "queue": {n: full(ring) for n, ring in mine["queue"].items()}, "clusters": {}}
    twins.plain.load_state_dict(whole)
    twins.run(first=4, steps=4)
    assert twins.plain.metrics()["mean_weight"] != 1


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [((2,), (3,), [4, 5, 6]), ((2, 2), (2,), [6, 6]), ((2,), (2, 2), [3, 4, 5, 6])],
    ids=["2 to 3", "2x2 to 2", "2 to 2x2"],
)
def test_a_checkpoint_goes_on_in_another_mesh(ranks, tmp_path, before, after, sizes):
    ranks(torch.Size(before).numel()).run(save_run, before, str(tmp_path))
    ranks(torch.Size(after).numel()).run(load_run, after, sizes, str(tmp_path))


def check_resumed(rank, folder):
    """Without a clusterer of the user k-means goes on bit for bit."""
    options = {"clusterer": None}

    def steps(twins, first, last):
        for step in range(first, last):
            twins.optimizer.zero_grad()
            twins.loss(twins.sharded, twins.batch(step, rank)).backward()
            twins.optimizer.step()

    twins = Twins(rank, (2,), options=options)
    steps(twins, 0, 4)
    save(saved(twins), checkpoint_id=folder)
    steps(twins, 4, 7)
    other = Twins(rank, (2,), options=options)
    state = saved(other)
    load(state, checkpoint_id=folder)
    set_state_dict(
        other.sharded,
        other.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    steps(other, 4, 7)
    for one, two in zip(twins.sharded.parameters(), other.sharded.parameters(), strict=True):
        assert torch.equal(full(one), full(two))
    assert twins.queue.digest() == other.queue.digest()


def test_a_resumed_run_continues_bit_for_bit(ranks, tmp_path):
    ranks(2).run(check_resumed, str(tmp_path))


def mean_on_gloo(module):
    """Have a module's gradients divided after their sum: gloo of torch 2.8 takes AVG for SUM."""
    module.set_force_sum_reduction_for_comms(True)


def check_mixed_precision(rank):
    """Parameters travel in bfloat16; statistics and raw gradients in the queue's float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    model, whole = Images(), Images()
    whole.load_state_dict(model.state_dict())
    mesh = init_device_mesh("cpu", (2,))
    for module in model.units():
        mean_on_gloo(fully_shard(module, mesh=mesh, mp_policy=policy))
    made = []
    for one, every in ((model, 1), (whole, 2)):
        groups = group_of if every == 1 else groups_of_two
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02)
        queue = GradQueue(one, n_clusters=CLUSTERS * every, features="norm", clusterer=groups,
                          queue_length=3, backend="torch")  # fmt: skip
        queue.attach(optimizer)
        made.append((queue, optimizer))
    (queue, optimizer), (_, other) = made
    for step in range(5):
        batches = [
            torch.randn(6, 6, generator=torch.Generator().manual_seed(10 * step + r))
            for r in range(2)
        ]
        for one in (optimizer, other):
            one.zero_grad()
        model(batches[rank].bfloat16()).float().square().mean().backward()
        whole(torch.cat(batches)).square().mean().backward()
        if step < 3:  # later a z near a bound decides otherwise in bfloat16
            for (name, mine), theirs in zip(
                model.named_parameters(), whole.parameters(), strict=True
            ):
                one, two = full(mine.grad), theirs.grad
                assert two is not None
                assert (one - two).norm() < 0.05 * two.norm(), name
        optimizer.step()
        other.step()
    queues = queue._queues
    for name, ring in queue.state_dict()["queue"].items():
        rows = full(ring).flatten(1)
        assert rows.dtype == torch.float32
        assert not torch.equal(rows, rows.bfloat16().float())
        expected = torch.empty(2, rows.shape[1])
        engine(rows.device, "torch").queue_statistics(rows, torch.tensor(5), expected)
        assert torch.equal(queues._read(name, rows.device)[0], expected)
        queues.end_pass()


def groups_of_two(features):
    first, second = features.chunk(2)
    return torch.cat([group_of(first), group_of(second) + CLUSTERS])


def test_mixed_precision_does_not_narrow_the_statistics(ranks):
    ranks(2).run(check_mixed_precision)


def check_refusals(rank):
    mesh = init_device_mesh("cpu", (2,))
    options = {"n_clusters": 2, "features": "norm"}

    model = Images()
    fully_shard(model.mix, mesh=mesh)
    with pytest.raises(ValueError, match=r"conv.weight is not divided, and clusters need all"):
        GradQueue(model, **options)

    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, grid["tensor"], plan)
    with pytest.raises(ValueError, match=r"0.weight is divided by parallelize_module"):
        GradQueue(model, n_clusters=2, features="1")
    fully_shard(model, mesh=grid["data"])
    with pytest.raises(ValueError, match=r"0.weight is divided by parallelize_module"):
        GradQueue(model, n_clusters=2, features="1")

    model = Images()
    queue = GradQueue(model, **options)
    for module in model.units():
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"build the GradQueue from the model .* fully_shard"):
        queue.attach(optimizer)
    with pytest.raises(ValueError, match='mode="microbatch" bypasses the hooks of fully_shard'):
        GradQueue(model, mode="microbatch", **options)


def test_what_cannot_be_clustered_is_refused_in_a_sentence(ranks):
    ranks(2).run(check_refusals)


def check_late_and_again(rank):
    """A forward pass comes before the plug-in, and the plug-in comes a second time."""
    torch.manual_seed(0)
    model = Images()
    for module in model.units():
        mean_on_gloo(fully_shard(module, mesh=init_device_mesh("cpu", (2,))))
    batch = torch.randn(6, 6)
    with torch.no_grad():
        model(batch)
    queue = GradQueue(model, n_clusters=2, features="norm", queue_length=3, backend="torch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        handle = queue.attach(optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            assert all(bool(full(param.grad).any()) for param in model.parameters())
            optimizer.step()
        handle.remove()
    assert all(int(count) == 8 for count in queue.state_dict()["queued"].values())
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    plain = Images()
    plain.load_state_dict({name: full(value) for name, value in model.state_dict().items()})
    plain(batch).square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(full(one.grad), other.grad, rtol=1e-5, atol=1e-7)


def test_a_plug_in_may_come_late_and_again(ranks):
    ranks(2).run(check_late_and_again)
