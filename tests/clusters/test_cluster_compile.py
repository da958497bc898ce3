# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false
"""Cluster gradients of compiled models: one graph, and the numbers of the oracle."""

import copy

import pytest
import torch
from cluster_cases import GPT, MLP, Block, Judge, ResNet, ViT
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import cudagraph_utils, output_code, scheduler

from gq_triton.cluster_grad import compiled_ops, passes

pytestmark = pytest.mark.slow
F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def vectors():
    return torch.randn(9, 6, dtype=F64)


def images():
    return torch.randn(9, 2, 8, 8, dtype=F64)


def tokens():
    return torch.randint(0, 9, (9, 5))


def losses(model, batch):
    return model(batch).flatten(1).square().mean(dim=1)


def judged(kind, **options):
    torch.manual_seed(0)
    return Judge(kind().to(F64), LABELS, 5, **options)


def compiled_steps(judge, compiled, make_batch, run=losses):
    """Run steps of the compiled model and of its oracle, which is not compiled."""
    batches = [make_batch() for _ in range(5)]
    judge.steps(lambda m, b: run(compiled if m is judge.model else m, b), batches)


CASES = {
    "mlp": (MLP, vectors),
    "gpt": (GPT, tokens),
    "resnet": (lambda: ResNet(lambda c: nn.GroupNorm(2, c)), images),
    "rms": (lambda: GPT(norm=nn.RMSNorm), tokens),
    "vit": (ViT, images),
}


RARE = "rms", "vit"  # layers of which the other models have one each


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.rare] if name in RARE else []) for name in CASES]
)
def test_one_graph_and_the_oracles_numbers(case):
    kind, make_batch = CASES[case]
    judge = judged(kind)
    compiled = torch.compile(judge.model, fullgraph=True, backend="aot_eager")
    compiled_steps(judge, compiled, make_batch)
    assert not counters["graph_break"]


def unannounced(graph, inputs):
    """Trace with the compiling flag off, as torch before 2.13 and threads of its engine may."""
    flag, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, False
    try:
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    finally:
        torch.compiler._is_compiling_flag = flag


def test_a_trace_that_no_flag_announces():
    judge = judged(lambda: ResNet(lambda c: nn.GroupNorm(2, c)))
    compiled = torch.compile(judge.model, fullgraph=True, backend=unannounced)
    compiled_steps(judge, compiled, images)


def test_inductor():
    judge = judged(MLP)
    compiled_steps(judge, torch.compile(judge.model, fullgraph=True), vectors)


class Parts:
    """A stand-in for the CUDA graphs of ``mode="reduce-overhead"``, on the CPU.

    Inductor divides a graph around what it may not capture, and makes CUDA graphs of the parts.

    Attributes:
        counts: the number of parts of each graph with any.
        inside: whether a part runs.
    """

    def __init__(self, monkeypatch):
        self.counts, self.inside = [], False
        # Graphs that were kept on disk were divided before, and these are for no other run.
        monkeypatch.setattr(inductor_config, "fx_graph_cache", False)
        monkeypatch.setattr(functorch_config, "enable_autograd_cache", False)
        monkeypatch.setattr(scheduler.BaseSchedulerNode, "is_gpu", lambda node: True)
        allowed = "check_lowering_disable_cudagraph"
        monkeypatch.setattr(cudagraph_utils, allowed, lambda devices: None)
        monkeypatch.setattr(output_code, "cudagraph_partition_post_compile", self.capture)
        monkeypatch.setattr(compiled_ops.passes, "param_grads", self.outside(passes.param_grads))

    def outside(self, function):
        def run(*args, **kwargs):
            assert not self.inside
            return function(*args, **kwargs)

        return run

    def capture(self, inputs, graph, *rest):
        info, static = graph.cudagraph_info, set(graph.fx_kwargs["static_input_idxs"])
        assert not info.cudagraph_fail_reasons
        whole = cudagraph_utils.CudagraphMetadata(
            info.placeholders, static, graph.mutated_input_idxs, info.stack_traces, {}
        )
        for part in graph.partition_maps:
            found = cudagraph_utils.get_partition_cudagraph_metadata(part, whole)
            # Trees of CUDA graphs leave out what writes to other inputs than static ones.
            assert found.mutated_input_idxs <= found.static_input_idxs
        if graph.partition_maps:
            self.counts.append(len(graph.partition_maps))
            graph.recursively_apply_fns([self.part] * self.counts[-1])

    def part(self, function):
        def run(inputs):
            self.inside = True
            try:
                return function(inputs)
            finally:
                self.inside = False

        return run


@pytest.mark.skipif(
    not getattr(inductor_config, "graph_partition", False), reason="This torch divides no graph."
)
def test_reduce_overhead_captures_all_but_this_packages_operations(monkeypatch):
    parts = Parts(monkeypatch)
    judge = judged(lambda: ResNet(lambda c: nn.GroupNorm(2, c)))
    compiled = torch.compile(judge.model, fullgraph=True, mode="reduce-overhead")
    compiled_steps(judge, compiled, images)
    forward, backward = parts.counts
    assert forward == 1  # operations on the host's tokens are moved beside it
    assert backward <= len(list(judge.model.parameters()))
    assert not counters["inductor"]["cudagraph_skips"]


def test_batch_norm_equals_eager_statistics_included():
    torch.manual_seed(0)
    model = ResNet(nn.BatchNorm2d).to(F64)
    judges = [Judge(m, LABELS, 5) for m in (model, copy.deepcopy(model))]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(5):
        batch = images()
        for judge, run in zip(judges, (compiled, judges[1].model), strict=True):
            judge.optimizer.zero_grad()
            losses(run, batch).mean().backward()
            judge.optimizer.step()
    mine, theirs = (judge.model.state_dict() for judge in judges)
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("features", ["0.features", "output_gradient"])
def test_a_model_within_a_compiled_whole(features):
    """The plug-in's own hooks are traced too, and so is the gradient at the output."""
    judge = judged(lambda: nn.Sequential(MLP()), features=features)
    whole = torch.compile(nn.Sequential(judge.model), fullgraph=True, backend="aot_eager")
    compiled_steps(judge, whole, vectors)
    assert counters["stats"]["unique_graphs"] == 1
    assert judge.queue.labels_ is not None


def test_two_forward_passes_of_one_graph_keep_their_own_clusters():
    judge = judged(MLP)
    other = torch.tensor([1, 1, 1, 3, 3, 0, 0, 0, 2])
    compiled = torch.compile(judge.model, fullgraph=True, backend="aot_eager")
    for batch in [vectors() for _ in range(5)]:
        judge.sync()
        expected = [judge.expected_without_push(losses(judge.twin, batch))]
        judge.labels = other
        expected.append(judge.expected_without_push(losses(judge.twin, -batch)))
        judge.optimizer.zero_grad()
        # The engine runs the later forward pass backward first; the first step's clusters must
        # not have gone with it.
        turns = iter([other, LABELS])
        judge.queue._clusters.labeller.clusterer = lambda features, turns=turns: next(turns)
        (losses(compiled, batch).mean() + losses(compiled, -batch).mean()).backward()
        judge.labels = LABELS
        judge.compare({n: expected[0][n] + expected[1][n] for n in expected[0]}, 1e-10)
        for name, ring in judge.rings.items():
            ring.push(judge.queue._clusters.accumulator.raw.kept[name])
        judge.optimizer.step()


def test_evaluation_and_layers_outside_the_model():
    judge = judged(MLP)
    compiled = torch.compile(judge.model, fullgraph=True, backend="aot_eager")

    def run(model, batch):
        if model is not compiled:
            return losses(model, batch)
        with torch.no_grad():
            compiled(batch[:2])
        result = losses(compiled, batch)
        with torch.no_grad():
            compiled(batch[:3])
            judge.model.head(torch.zeros(2, 12, dtype=F64))
        return result

    compiled_steps(judge, compiled, vectors, run)
    with pytest.raises(RuntimeError, match="head was called outside"):
        torch.compile(judge.model.head, backend="aot_eager")(torch.zeros(2, 12, dtype=F64))


# The warning is Dynamo's: it comes with any model whose blocks are compiled one by one.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_blocks_compiled_one_by_one_share_their_graph():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Linear(6, 8)
            self.blocks = nn.ModuleList(Block(8, False) for _ in range(10))

        def forward(self, x):
            x = self.features(x)[:, None, :]
            for block in self.blocks:
                x = block(x)
            return x

    judge = judged(Deep)
    for block in judge.model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled_steps(judge, judge.model, vectors)
    assert counters["stats"]["unique_graphs"] <= 2


def test_steps_go_with_their_graphs():
    judge = judged(MLP)
    compiled = torch.compile(judge.model, fullgraph=True, backend="aot_eager")
    counts = []
    for model in (judge.model, compiled):
        for _ in range(4):
            judge.optimizer.zero_grad()
            losses(model, vectors()).mean().backward()
            judge.optimizer.step()
            losses(model, vectors())  # a forward pass without a backward pass
            counts.append(len(passes._steps))
    assert counts[1:4] == counts[1:2] * 3
    assert counts[5:] == counts[5:6] * 3


def test_double_backward_is_refused():
    judge = judged(MLP)
    loss = losses(judge.model, vectors()).mean()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, judge.model.head.weight, create_graph=True)


def test_a_parameter_that_the_forward_pass_does_not_use():
    class Unused(MLP):
        def __init__(self):
            super().__init__()
            self.register_parameter("unused", nn.Parameter(torch.zeros(3)))

    judge = judged(Unused)
    compiled = torch.compile(judge.model, backend="aot_eager")
    losses(compiled, vectors()).mean().backward()
    assert judge.model.unused.grad is None


@pytest.mark.filterwarnings("ignore:weighted without clusters")
def test_rows_in_two_dimensions_are_not_believed_to_be_in_order():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.experts = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6)] * 2)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            rows = self.features(x).flatten(0, 1).roll(1, 0)
            rows = torch.cat([e(r) for e, r in zip(self.experts, rows.chunk(2), strict=True)])
            return self.head(rows.view_as(x))

    judge = judged(Experts)
    compiled = torch.compile(judge.model, backend="aot_eager")
    compiled(torch.randn(len(LABELS), 4, 6, dtype=F64)).square().mean().backward()
    report = judge.queue.report()
    assert report["experts.0.weight"].startswith("whole batch")
    assert report["head.weight"] == "clusters (Linear)"


def test_no_cuda_graph_holds_an_operation_of_this_package():
    """``mode="reduce-overhead"`` captures parts of a graph, and a replay would not call them."""
    operations = [value for name, value in vars(compiled_ops).items() if name.endswith("_op")]
    assert len(operations) == 7
    assert all(torch.Tag.cudagraph_unsafe in operation.tags for operation in operations)
