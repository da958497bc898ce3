"""A model divided by ``fully_shard``, and the one process that it must equal, step by step."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gq_triton import GradQueue

F64 = torch.float64
CLUSTERS = 3


class Words(nn.Module):
    """Embedding, positions, two blocks and a tied head; sizes that no mesh divides."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6, bias=False))
            for _ in range(2)
        )
        self.norm = nn.RMSNorm(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))

    def units(self):
        return [*self.blocks, self]


class Images(nn.Module):
    """A convolution and linear layers, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.GroupNorm(2, 4)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.norm(self.conv(x[:, None])).tanh()
        x = self.mix(self.mix(x).tanh())
        return self.head(x.flatten(1))

    def units(self):
        return [self.conv, self.mix, self]


def group_of(features):
    """Return a cluster for every sample that depends on the sample alone, not on its scale."""
    places = torch.arange(1, features.shape[1] + 1, dtype=features.dtype)
    where = features @ places / features.norm(dim=1)
    return (where * 3 + 0.5).floor().long().remainder(CLUSTERS)


@dataclass
class Twins:
    """One model on all ranks, divided, and whole in this process with the data of all ranks.

    Attributes:
        rank: this rank.
        shape: the mesh: ``(shard,)`` or ``(copy, shard)``.
        model: the class of the model.
        sizes: the samples of each rank in a forward pass.
        options: options of both plug-ins.
        sharding: options of ``fully_shard``.
        wrap: changes the model that is to be divided, before it is.
        lr: learning rate.
    """

    rank: int
    shape: tuple[int, ...]
    model: Any = Images
    sizes: Any = 6
    options: dict[str, Any] = field(default_factory=dict)
    sharding: dict[str, Any] = field(default_factory=dict)
    wrap: Any = None
    lr: float = 0.1
    brings: bool = False  # the labels come with the batch, and from no clusterer

    def __post_init__(self):
        world = dist.get_world_size()
        if isinstance(self.sizes, int):
            self.sizes = [self.sizes] * world
        torch.manual_seed(0)
        self.whole = self.model().to(F64)
        self.sharded = copy.deepcopy(self.whole)
        if self.wrap is not None:
            self.wrap(self.sharded)
        self.divide(self.sharded)
        options: dict[str, Any] = {"features": "norm", "queue_length": 3, "backend": "torch"}
        options |= self.options
        mine = {"n_clusters": CLUSTERS, "clusterer": group_of}
        found = {"features": None, "clusterer": None, "labels": True} if self.brings else {}
        self.queue = GradQueue(self.sharded, **{**mine, **options, **found})
        every = {"n_clusters": CLUSTERS * world, "clusterer": self.groups_of_all}
        self.plain = GradQueue(self.whole, **{**options, **every})
        self.optimizer = self.make(self.sharded)
        self.other = self.make(self.whole)
        self.handle = self.queue.attach(self.optimizer)
        self.plain.attach(self.other)

    def make(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.5)

    def divide(self, model):
        mesh = init_device_mesh(
            "cpu", self.shape, mesh_dim_names=("copy", "shard")[-len(self.shape) :]
        )
        for module in model.units():
            fully_shard(module, mesh=mesh, **self.sharding)

    def groups_of_all(self, features):
        parts = features.split(self.sizes)
        return torch.cat([group_of(part) + CLUSTERS * r for r, part in enumerate(parts)])

    def batch(self, step, rank):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        size = self.sizes[rank]
        if self.model is Words:
            return torch.randint(11, (size, 4), generator=generator)
        return torch.randn(size, 6, generator=generator, dtype=F64)

    def loss(self, model, batch):
        return (model(batch) - 0.3).square().mean()

    def backward(self, step, scale=1.0):
        """Run one forward and backward pass of both models; return their losses."""
        batches = [self.batch(step, rank) for rank in range(len(self.sizes))]
        all_of_them = self.loss(self.whole, torch.cat(batches)) * scale
        all_of_them.backward()
        if self.brings:
            labels = self.plain.labels_
            assert labels is not None
            mine_of_all = labels.split(self.sizes)[self.rank] - CLUSTERS * self.rank
            self.queue.set_labels(mine_of_all)
        mine = self.loss(self.sharded, batches[self.rank]) * scale
        mine.backward()
        return mine.detach(), all_of_them.detach()

    def zero_grad(self, **options):
        self.optimizer.zero_grad(**options)
        self.other.zero_grad(**options)

    def step(self):
        self.optimizer.step()
        self.other.step()

    def pairs(self):
        """Yield name, sharded parameter, whole parameter."""
        whole = dict(self.whole.named_parameters())
        for name, param in self.sharded.named_parameters():
            yield name, param, whole[name.replace("_checkpoint_wrapped_module.", "")]

    def assert_same(self, near=1e-10):
        for name, one, other in self.pairs():
            for a, b in ((one, other), (one.grad, other.grad)):
                torch.testing.assert_close(
                    a.full_tensor(), b, rtol=near, atol=near / 100,
                    msg=lambda text, name=name: f"{name}: {text}",
                )  # fmt: skip

    def assert_same_metrics(self, *, but=()):
        mine, theirs = self.queue.metrics(), self.plain.metrics()
        sizes, all_sizes = mine.pop("cluster_sizes"), theirs.pop("cluster_sizes")
        first = CLUSTERS * self.rank
        assert sizes == all_sizes[first : first + len(sizes)]
        for name in mine.keys() - set(but):
            value = mine[name]
            assert abs(value - theirs[name]) <= 1e-9 * abs(theirs[name]), (name, mine, theirs)
        layers = self.plain.metrics(per_layer=True)
        for layer, own in self.queue.metrics(per_layer=True).items():
            for name in own.keys() - set(but):
                error = abs(own[name] - layers[layer][name])
                assert error <= 1e-9 * abs(layers[layer][name]), (layer, name)

    def run(self, first=0, steps=6, near=1e-10):
        for step in range(first, first + steps):
            self.zero_grad()
            self.backward(step)
            self.assert_same(near)
            self.step()
            self.assert_same_metrics()
