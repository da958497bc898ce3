# pyright: reportOptionalMemberAccess=false, reportArgumentType=false
"""A second sink gets each cluster's gradient from the layers, and does not weight it."""

import copy

import pytest
import torch
from cluster_cases import GPT, MLP, ResNet, ViT, cluster_means
from torch import nn

from gq_triton.cluster_grad import Clusters, Taken
from gq_triton.cluster_grad.sink import Coming
from gq_triton.options import ClusterOptions

F64 = torch.float64
LABELS = torch.tensor([0, 2, 2, 0, 4, 0, 0, 2, 2])


class Collect:
    """A sink that keeps the K mean gradients and leaves ``p.grad`` as torch computes it."""

    backend, later = "torch", None

    def __init__(self, params):
        self.params, self.means, self.whole = params, {}, []

    def take(self, name, groups, blocks, dtype):
        parts, end = [], 0
        for start, stop, sums in blocks:
            assert start == end
            assert sums.dtype == dtype
            parts.append(sums.clone())
            end = stop
        assert end == self.params[name].numel()
        return self._keep(name, groups, torch.cat(parts, dim=1))

    def take_rows(self, name, groups, rows, sums):
        param = self.params[name]
        table = torch.zeros(len(sums), *param.shape, dtype=sums.dtype)
        table.index_copy_(1, rows, sums.view(len(sums), len(rows), -1))
        return self._keep(name, groups, table.flatten(1))

    def take_whole(self, name, groups, grad):
        self.whole.append(name)
        return Taken(grad, grad)

    def _keep(self, name, groups, sums):
        param = self.params[name]
        means = sums * groups.inverse_shares[:, None]
        self.means[name] = means.view(-1, *param.shape)
        raw = sums.sum(dim=0).view_as(param)
        return Taken(raw.to(param.dtype), raw)


class Table(nn.Module):
    """A table of which each step touches a few rows."""

    def __init__(self):
        super().__init__()
        self.table, self.features = nn.Embedding(99, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.features(self.table(tokens).mean(dim=1))


CASES = {
    "mlp": (MLP, lambda: torch.randn(9, 6, dtype=F64)),
    "resnet": (lambda: ResNet(lambda c: nn.GroupNorm(2, c)),
               lambda: torch.randn(9, 2, 8, 8, dtype=F64)),
    "vit": (ViT, lambda: torch.randn(9, 2, 8, 8, dtype=F64)),
    "gpt, tied head": (lambda: GPT(norm=nn.RMSNorm), lambda: torch.randint(0, 9, (9, 5))),
    "table": (Table, lambda: torch.randint(0, 99, (9, 2))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_sink_gets_the_mean_gradient_of_each_cluster(case):
    kind, make_batch = CASES[case]
    torch.manual_seed(0)
    model = kind().to(F64)
    twin, batch = copy.deepcopy(model), make_batch()
    named = dict(model.named_parameters())
    sink = Collect(named)
    clusters = Clusters(
        model, {param: name for name, param in named.items()}, sink,
        ClusterOptions(n_clusters=5, features="features", clusterer=lambda features: LABELS),
    )  # fmt: skip
    clusters.install()

    def losses(m):
        return (m(batch) - 1).square().flatten(1).mean(dim=1)

    expected, _ = cluster_means(twin, losses(twin), LABELS, 5)
    losses(model).mean().backward()
    losses(twin).mean().backward()
    assert sink.means.keys() == expected.keys()
    assert not sink.whole
    for name, means in expected.items():
        torch.testing.assert_close(sink.means[name], means, rtol=1e-10, atol=1e-13)
        plain = twin.get_parameter(name).grad
        torch.testing.assert_close(named[name].grad, plain, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(clusters.accumulator.raw.kept[name], plain, rtol=1e-10,
                                   atol=1e-13)  # fmt: skip


def test_a_gradient_whose_weighting_failed_asks_for_a_new_pass():
    with pytest.raises(RuntimeError, match=r"not weighted.*zero_grad\(\)"):
        Coming(torch.zeros(2), settle=lambda: None).flat()
