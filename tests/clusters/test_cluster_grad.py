# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""One backward pass gives the same gradients as K passes whose means the oracle weights."""

import copy

import pytest
import torch
from cluster_cases import GPT, MLP, Judge, ResNet, ViT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gq_triton import GradQueue, reference

F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])  # clusters 1 and 3 are empty, 4 has one sample


def images(count=5, batch=9):
    torch.manual_seed(7)
    return [torch.randn(batch, 2, 8, 8, dtype=F64) for _ in range(count)]


def tokens(count=5, batch=9):
    torch.manual_seed(7)
    return [torch.randint(0, 9, (batch, 5)) for _ in range(count)]


def square(model, batch):
    return (model(batch) - 1).square().flatten(1).mean(dim=1)


def next_token(model, batch):
    logits = model(batch)[:, :-1].transpose(1, 2)
    return nn.functional.cross_entropy(logits, batch[:, 1:], reduction="none").mean(dim=1)


CASES = {
    "mlp": (MLP, lambda: [x.flatten(1)[:, :6] for x in images()], square),
    "resnet group norm": (lambda: ResNet(lambda c: nn.GroupNorm(2, c)), images, square),
    "gpt, tied head": (GPT, tokens, next_token),
    "gpt, rms norm": (lambda: GPT(norm=nn.RMSNorm), tokens, next_token),
    "vit": (ViT, images, square),
}


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("case", CASES)
def test_whole_models_agree_with_one_pass_per_cluster(case, backend):
    make, batches, run = CASES[case]
    torch.manual_seed(0)
    Judge(make().to(F64), LABELS, 5, backend=backend).steps(run, batches())


class Small(nn.Module):
    """A model with all kinds of sums of an engine: a weight, a table's rows, a channel."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(5, 4), nn.GroupNorm(2, 4)
        self.features = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.features(torch.tanh(self.norm(self.table(tokens).transpose(1, 2))).mean(dim=2))


# The interpreter computes both sides of tl.where: one of them is z / 0 for a constant queue.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("match_norm", [False, True])
@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_every_backend_runs_the_whole_plug_in(backend, match_norm):
    """Triton runs on the CPU in its interpreter."""
    torch.manual_seed(0)
    models = [Small().to(F64)]
    models.append(copy.deepcopy(models[0]))
    options = {"clusterer": lambda f: LABELS, "loss_window": 2, "match_norm": match_norm}
    runs = []
    for model, engine in zip(models, (backend, "torch"), strict=True):
        queue = GradQueue(model, n_clusters=5, features="features", queue_length=3,
                          min_queue_length=2, backend=engine, **options)  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        queue.attach(optimizer)
        for batch in tokens():
            optimizer.zero_grad()
            loss = square(model, batch % 5).mean()
            queue.record_loss(loss.detach())
            loss.backward()
            optimizer.step()
        metrics = queue.metrics()
        assert metrics.pop("cluster_sizes") == [4, 0, 4, 0, 1]
        runs.append((dict(model.named_parameters()), metrics))
    assert runs[0][1]["mean_weight"] != 1
    # A kernel returns its sums in float32: an error of 2**-24 each, half of it in a norm's root.
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)
    rtol = 1e-6 if match_norm else 1e-10
    for name, param in runs[0][0].items():
        torch.testing.assert_close(param, runs[1][0][name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "options",
    [{"population_power": 0.0}, {"centroid_scale": "standard_error"}, {"population_power": 0.5}],
)
def test_options_of_the_mixture(options):
    torch.manual_seed(0)
    Judge(MLP().to(F64), LABELS, 5, **options).steps(square, CASES["mlp"][1]())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_float32_agrees_within_rounding(backend):
    torch.manual_seed(0)
    batches = [x.float() for x in images()]
    Judge(ViT(), LABELS, 5, backend=backend).steps(square, batches, rtol=5e-4)


@pytest.mark.slow
def test_one_cluster_is_no_cluster():
    torch.manual_seed(0)
    model = GPT().to(F64)
    twin = copy.deepcopy(model)
    plain = torch.optim.SGD(twin.parameters(), lr=0.05)
    GradQueue(twin, queue_length=3).attach(plain)
    judge = Judge(model, torch.zeros(9, dtype=torch.int64), 1)
    for batch in tokens():
        for m, o in ((model, judge.optimizer), (twin, plain)):
            o.zero_grad()
            next_token(m, batch).mean().backward()
            o.step()
    for actual, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_the_names_of_the_clusters_do_not_matter():
    def run(labels):
        torch.manual_seed(0)
        judge = Judge(MLP().to(F64), labels, 5)
        judge.steps(square, CASES["mlp"][1]())
        return [p.grad.clone() for p in judge.model.parameters()]

    permuted = torch.tensor([3, 0, 1, 2, 4])[LABELS]
    for first, second in zip(run(LABELS), run(permuted), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_batch_norm_reads_each_cluster_by_its_rows():
    """A cluster's gradient is that of its rows, and the clusters add up to the batch's."""
    torch.manual_seed(0)
    model = ResNet(nn.BatchNorm2d).to(F64)
    twin = copy.deepcopy(model)
    judge = Judge(model, LABELS, 5, queue_length=2)
    for batch in images(3):
        judge.optimizer.zero_grad()
        square(model, batch).mean().backward()
        twin.zero_grad()
        twin.load_state_dict({k: v for k, v in model.state_dict().items() if "running" not in k
                              and "tracked" not in k}, strict=False)  # fmt: skip
        square(twin, batch).mean().backward()
        raw = judge.queue._clusters.accumulator.raw.kept
        for name, param in twin.named_parameters():
            torch.testing.assert_close(raw[name], param.grad, rtol=1e-10, atol=1e-13)
        judge.optimizer.step()
    for name, buffer in model.named_buffers():
        if "running" in name:
            assert torch.isfinite(buffer).all()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_layers_drawn_at_random(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6), label="seed"))
    dims = data.draw(st.sampled_from([1, 2, 3]), label="dimensions")
    groups = data.draw(st.sampled_from([1, 2]), label="groups")
    kernel = data.draw(st.integers(1, 3), label="kernel")
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](
        4,
        6,
        kernel,
        stride=data.draw(st.integers(1, 2), label="stride"),
        padding=data.draw(st.sampled_from([0, 1, "valid"]), label="padding"),
        dilation=data.draw(st.integers(1, 2), label="dilation"),
        groups=groups,
        bias=data.draw(st.booleans(), label="bias"),
        padding_mode=data.draw(st.sampled_from(["zeros", "circular"]), label="mode"),
    )
    model = nn.Sequential(conv, nn.GroupNorm(2, 6), nn.Flatten(2), nn.Linear(1, 2)).to(F64)
    model[3] = nn.Identity()
    batch = data.draw(st.integers(1, 7), label="batch")
    clusters = data.draw(st.integers(1, 4), label="clusters")
    labels = torch.tensor(data.draw(st.lists(st.integers(0, clusters - 1), min_size=batch,
                                             max_size=batch), label="labels"))  # fmt: skip
    if data.draw(st.booleans(), label="channels_last") and dims == 2:
        model = model.to(memory_format=torch.channels_last)
    judge = Judge(model, labels, clusters, features="2", queue_length=2)
    batches = [torch.randn(batch, 4, *[6] * dims, dtype=F64) for _ in range(4)]
    judge.steps(square, batches)


def test_gradient_accumulation_is_one_larger_batch():
    """Check that A micro-batches of K clusters equal one batch of A * K clusters."""
    torch.manual_seed(0)
    batches = [x.flatten(1)[:, :6] for x in images(5, batch=12)]
    labels = [torch.tensor([0, 1, 1, 0, 2, 0]), torch.tensor([1, 1, 0, 2, 2, 2])]
    whole = Judge(MLP().to(F64), torch.cat([labels[0], labels[1] + 3]), 6)
    parts = copy.deepcopy(whole.twin)
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.05)
    turn = iter(labels * 5)
    queue = GradQueue(
        parts, n_clusters=3, features="features", clusterer=lambda f: next(turn),
        queue_length=3, accumulation_steps=2,
    )  # fmt: skip
    queue.attach(optimizer)
    for batch in batches:
        whole.optimizer.zero_grad()
        square(whole.model, batch).mean().backward()
        whole.optimizer.step()
        optimizer.zero_grad()
        for part in batch.split(6):
            (square(parts, part).mean() / 2).backward()
        optimizer.step()
    for actual, expected in zip(parts.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_microbatch_mode_serves_any_model():
    torch.manual_seed(0)

    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Linear(6, 4)
            self.scale = nn.Parameter(torch.ones(4))
            self.gru = nn.GRU(4, 3, batch_first=True)

        def forward(self, x):
            return self.gru((self.features(x) * self.scale).unsqueeze(1))[0][:, 0]

    model = Free().to(F64)
    judge = Judge(model, LABELS, 5, mode="microbatch")
    for number, batch in enumerate(CASES["mlp"][1]()):
        judge.sync()
        expected = judge.expected(square(judge.twin, batch))
        judge.optimizer.zero_grad()
        judge.queue.backward(square(model, batch))
        judge.compare(expected, 1e-10, f"step {number}")
        judge.optimizer.step()


def test_a_summed_loss_and_a_last_batch_of_another_size():
    torch.manual_seed(0)
    model = MLP().to(F64)
    twin = copy.deepcopy(model)
    labels = iter([LABELS, LABELS, LABELS, LABELS[:4], LABELS])
    same = iter([LABELS, LABELS, LABELS, LABELS[:4], LABELS])
    batches = [x.flatten(1)[:, :6] for x in images()]
    batches[3] = batches[3][:4]
    results = []
    for m, turn, reduction in ((model, labels, "mean"), (twin, same, "sum")):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05)
        options = {"clusterer": lambda f, turn=turn: next(turn), "queue_length": 3}
        queue = GradQueue(m, n_clusters=5, features="features", loss_reduction=reduction, **options)
        queue.attach(optimizer)
        for batch in batches:
            optimizer.zero_grad()
            losses = square(m, batch)
            (losses.mean() if reduction == "mean" else losses.sum()).backward()
            if reduction == "sum":
                for param in m.parameters():
                    param.grad /= len(batch)
            optimizer.step()
        results.append((queue, [p.detach() for p in m.parameters()]))
    for actual, expected in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_sample_weights_say_how_samples_count():
    """A mean over the tokens of sequences of unequal length weights samples by their tokens."""
    torch.manual_seed(0)
    model = MLP().to(F64)
    weights = torch.tensor([1.0, 2, 3, 1, 5, 2, 2, 1, 4], dtype=F64)
    judge = Judge(model, LABELS, 5)
    ring = {name: reference.Ring(3) for name, _ in model.named_parameters()}
    for batch in CASES["mlp"][1]():
        judge.sync()
        named = dict(judge.twin.named_parameters())
        losses = square(judge.twin, batch) * weights
        sums, population = [], []
        for k in range(5):
            inside = k == LABELS
            population.append(float(weights[inside].sum()))
            grads = [torch.zeros_like(p) for p in named.values()]
            if population[-1]:
                part = losses[inside].sum() / weights[inside].sum()
                grads = torch.autograd.grad(part, list(named.values()), retain_graph=True)
            sums.append(grads)
        judge.queue.set_sample_weights(weights)
        judge.optimizer.zero_grad()
        ((square(model, batch) * weights).sum() / weights.sum()).backward()
        expected = {}
        for index, name in enumerate(named):
            means = torch.stack([grads[index] for grads in sums])
            expected[name] = reference.cluster_gradient(means, population, ring[name].newest())
            ring[name].push(torch.tensordot(torch.tensor(population, dtype=F64) / sum(population),
                                            means, dims=1))  # fmt: skip
        judge.compare(expected, 1e-10)
        judge.optimizer.step()


def test_the_conv1d_of_gpt2_is_a_linear_layer_with_a_transposed_weight():
    """A stand-in with the name and the arithmetic of ``transformers.pytorch_utils.Conv1D``."""

    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs)
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return flat.view(*x.shape[:-1], -1)

    Conv1D.__module__ = "transformers.pytorch_utils"
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(7, 6), nn.GELU(), Conv1D(3, 7)).to(F64)
    judge = Judge(model, LABELS, 5, features="0")
    assert set(judge.queue.report().values()) == {"clusters (Conv1D)"}
    judge.steps(square, [torch.randn(9, 4, 6, dtype=F64) for _ in range(5)])


@pytest.mark.slow
def test_gpt2_of_transformers():
    """GPT-2 has a tied head and ``Conv1D`` layers, and looks its positions up for all samples."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double()
    judge = Judge(model, LABELS, 5, features="transformer.ln_f", strict=True)

    def run(model, tokens):
        return model(tokens).logits.square().flatten(1).mean(dim=1)

    judge.steps(run, [torch.randint(0, 20, (9, 5)) for _ in range(5)])
    kinds = {"clusters (Linear)", "clusters (Conv1D)", "clusters (Embedding)"}
    # The head's weight is that of the token table, and is named once.
    assert set(judge.queue.report().values()) - kinds == {"clusters (LayerNorm)"}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_layer_without_inputs_has_a_bias_and_nothing_to_weight():
    model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4)).double()
    queue = GradQueue(model, n_clusters=2, features="1", queue_length=2, clusterer=halves)
    queue.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        model.zero_grad()
        model(torch.randn(8, 6, dtype=torch.float64)).sub(1).square().mean().backward()
    assert model[1].weight.grad.shape == (4, 0)
    assert bool(model[1].bias.grad.ne(0).all())


def halves(features):
    return (torch.arange(len(features)) >= len(features) // 2).long()
