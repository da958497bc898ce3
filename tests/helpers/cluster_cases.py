# Gradients, layers and labels exist after a backward pass, although their types allow None.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""The oracle of clustered gradients, one autograd pass per cluster, and small whole models."""

import copy

import torch
from torch import nn

from gq_triton import GradQueue, reference


def cluster_means(model, losses, labels, clusters):
    """Return each cluster's mean gradient by parameter name, ``(K, *shape)``, and the sizes."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    params = [p for _, p in named]
    sizes = [int((labels == k).sum()) for k in range(clusters)]
    means = {name: [] for name, _ in named}
    for k, size in enumerate(sizes):
        grads = [torch.zeros_like(p) for p in params]
        if size:
            part = losses[labels == k].mean()
            found = torch.autograd.grad(part, params, retain_graph=True, allow_unused=True)
            grads = [z if g is None else g for z, g in zip(grads, found, strict=True)]
        for (name, _), grad in zip(named, grads, strict=True):
            means[name].append(grad)
    return {name: torch.stack(values) for name, values in means.items()}, sizes


class Judge:
    """A model with the plug-in, and its oracle, which judges every gradient of every step."""

    def __init__(
        self, model, labels, clusters, *, queue_length=3, features="features", brings=False,
        **options,
    ):  # fmt: skip
        self.model, self.labels, self.clusters = model, labels, clusters
        # A copy from before the plug-in: the oracle's layers are torch's own.
        self.twin = copy.deepcopy(model)
        self.law = {
            name: options.get(name, default)
            for name, default in (("population_power", 1.0), ("centroid_scale", "paper"))
        }
        self.brings = brings  # the labels come with the batch, and from no clusterer
        found = {"features": features, "clusterer": lambda features: self.labels}
        options |= {"labels": True} if brings else found
        self.queue = GradQueue(model, n_clusters=clusters, queue_length=queue_length, **options)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.handle = self.queue.attach(self.optimizer)
        names = dict(model.named_parameters())
        self.rings = {name: reference.Ring(queue_length) for name in names}

    def expected(self, losses):
        means, sizes = cluster_means(self.twin, losses, self.labels, self.clusters)
        grads = {}
        for name, values in means.items():
            ring = self.rings[name]
            grads[name] = reference.cluster_gradient(values, sizes, ring.newest(), **self.law)
            shares = torch.tensor([n / sum(sizes) for n in sizes], dtype=torch.float64)
            mean = torch.tensordot(shares, values.double(), dims=1)
            ring.push(mean.to(values.dtype))
        return grads

    def expected_without_push(self, losses):
        means, sizes = cluster_means(self.twin, losses, self.labels, self.clusters)
        return {
            name: reference.cluster_gradient(values, sizes, self.rings[name].newest(), **self.law)
            for name, values in means.items()
        }

    def sync(self):
        self.twin.load_state_dict(self.model.state_dict())

    def compare(self, expected, rtol, what=""):
        for name, param in self.model.named_parameters():
            if name not in expected:
                continue
            scale = float(expected[name].abs().max()) or 1.0
            error = float((param.grad.double() - expected[name]).abs().max()) / scale
            assert error <= rtol, f"{what} {name}: relative error {error:.2e} > {rtol:.0e}"

    def steps(self, run, batches, rtol=1e-10, after_step=False):
        """Train and compare every step; the queue is full after the third one.

        Args:
            run: returns the losses ``(B,)`` of a model and a batch.
            batches: one for each step.
            rtol: relative to the largest element of each gradient.
            after_step: compare after the optimizer's step instead of before it.
        """
        for number, batch in enumerate(batches):
            self.sync()
            expected = self.expected(run(self.twin, batch))
            self.optimizer.zero_grad()
            if self.brings:
                self.queue.set_labels(self.labels)
            run(self.model, batch).mean().backward()
            if after_step:
                self.optimizer.step()
            self.compare(expected, rtol, f"step {number}")
            if not after_step:
                self.optimizer.step()


class MLP(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.features(x).relu())


class ResNet(nn.Module):
    """Two residual blocks; in-place activations as in the usual implementations."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(norm(4) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.relu = nn.ReLU(inplace=True)
        self.features = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.norms[0](self.stem(x)))
        for conv, norm in zip(self.convs, self.norms[1:], strict=True):
            x = self.relu(norm(conv(x)) + x)
        return self.head(self.features(x).flatten(1))


class Attention(nn.Module):
    def __init__(self, width, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*split, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width, causal, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attention = Attention(width, 2, causal)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Token and position tables, two blocks, a head tied to the token table."""

    def __init__(self, vocabulary=11, width=8, length=5, norm=nn.LayerNorm):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, True, norm) for _ in range(2))
        self.features = norm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.features(x))


class ViT(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.patches = nn.Conv2d(2, width, 4, stride=4)
        self.positions = nn.Embedding(4, width)
        self.blocks = nn.ModuleList(Block(width, False) for _ in range(2))
        self.features = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.positions(torch.arange(4).expand(len(x), 4))
        for block in self.blocks:
            x = block(x)
        return self.head(self.features(x).mean(dim=1))
