"""The sink of the noise meter: squared norms of the groups' gradients, parameter by parameter.

A group k has n_k of the B samples and the sum ``s_k`` of their parts of the batch's gradient g, so
that ``g = sum_k s_k``. With ``c_k = s_k B / n_k``, the group's mean gradient, ``s_k - g n_k / B``
is ``(c_k - g) n_k / B``. All squares below are formed of such differences, which lose no digits
where the groups hardly differ.

Shapes: K clusters, P elements of a parameter, E elements of a block.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from gq_triton.cluster_grad import Taken
from gq_triton.cluster_grad.later import Later
from gq_triton.cluster_grad.site import Block
from gq_triton.grouping import Groups
from gq_triton.ring import flat

__all__ = ["Squares"]


# Elements of the groups' sums whose squares are taken at once on the CPU: they stay in its cache.
_ROOM = 1 << 18


class Squares:
    """The sink that measures the groups' gradients and leaves the batch's gradient as it is.

    Args:
        params: the model's parameters by name.
        leaves: by parameter name, the tensors that have the shape, memory order and type of the
            gradients; other ones than the parameters in a model that ``fully_shard`` has divided.
        backend: the engine that forms the layers' sums.
        halves: whether groups 2k and 2k + 1 are two random halves of cluster k.

    Attributes:
        later: None: no gradient waits.
        known: names of the parameters that were measured in the running backward pass.
        unknown: names of parameters whose gradient is not known by group.
        fresh: whether no parameter had a ``p.grad`` to which the backward pass adds.
    """

    def __init__(
        self, params: Mapping[str, Tensor], leaves: Mapping[str, Tensor], backend: str, *,
        halves: bool,
    ) -> None:  # fmt: skip
        self._params, self._leaves = params, leaves
        self.backend, self._halves = backend, halves
        self.later: Later | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the squares of a backward pass."""
        self.known: set[str] = set()
        self.unknown: set[str] = set()
        self.fresh = True
        self._sizes: _Sizes | None = None
        # Norms of the blocks, and the parameters that they belong to.
        self._norms: list[Tensor] = []
        self._owners: list[str] = []

    def take(self, name: str, groups: Groups, blocks: Iterator[Block], dtype: torch.dtype) -> Taken:
        """Measure a parameter's groups, block by block; return the sum of all samples."""
        param = self._leaves[name]
        whole = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
        out = flat(whole, like=param)
        self.begin(name)
        for start, stop, sums in blocks:
            self._add(name, groups, sums, out[start:stop])
        return _taken(whole, param)

    def take_rows(self, name: str, groups: Groups, rows: Tensor, sums: Tensor) -> Taken:
        """Measure the groups of a table's touched rows; all others have gradient 0 in each."""
        param = self._leaves[name]
        total = torch.empty_like(sums[0])
        self.begin(name)
        self._add(name, groups, sums, total)
        whole = torch.zeros_like(param, dtype=sums.dtype)
        whole.index_copy_(0, rows, total.view(len(rows), -1))
        return _taken(whole, param)

    def take_lookups(self, name: str, groups: Groups, where: Tensor, grads: Tensor) -> Taken:
        """Measure the groups of a table's lookups."""
        height, width = self._leaves[name].shape
        each = len(where) // len(groups.labels)
        labels = groups.labels.repeat_interleave(each)
        wide = torch.promote_types(grads.dtype, torch.float32)
        # One row more than the table has, for lookups that do not count.
        sums = grads.new_zeros(groups.n_clusters * (height + 1), width, dtype=wide)
        sums.index_add_(0, labels * (height + 1) + where, grads.to(wide))
        sums = sums.view(groups.n_clusters, height + 1, width)[:, :height].flatten(1)
        return self.take(name, groups, iter([(0, height * width, sums)]), wide)

    def take_whole(self, name: str, groups: Groups, grad: Tensor) -> Taken:
        """Return a gradient that is not known by group, and note that."""
        self.unknown.add(name)
        return Taken(grad, grad)

    def begin(self, name: str) -> None:
        """Note that a parameter is measured; twice is not at all.

        A second forward pass or a second loss gives two gradients, of which neither is the whole.
        """
        if name in self.known:
            self.unknown.add(name)
        self.known.add(name)
        self.fresh = self.fresh and self._params[name].grad is None

    def measure(self, name: str, groups: Groups, sums: Tensor) -> None:
        """Keep the norms of a block of a parameter for which ``begin`` was called."""
        self._add(name, groups, sums, torch.empty_like(sums[0]))

    def _add(self, name: str, groups: Groups, sums: Tensor, total: Tensor) -> None:
        """Add up the groups' sums ``(K, E)`` into ``total``, and keep the norms of a block."""
        sizes = self._sizes
        if sizes is None or sizes.groups is not groups:
            sizes = self._sizes = _Sizes(groups, self._halves)
        width = total.numel() if sums.is_cuda else max(1, _ROOM // len(sums))
        for start in range(0, total.numel(), width):
            part = sums[:, start : start + width]
            norms = sizes.norms(part, torch.sum(part, dim=0, out=total[start : start + width]))
            self._norms.append(norms)
            self._owners.append(name)

    def figures(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the figures of parameters, and the norms of the clusters' gradients.

        Args:
            names: the parameters.

        Returns:
            ``(N, 4)`` float64, NaN where a parameter is not known by group, and ``(K,)`` float64.
            The columns are: the sum of squares around the batch's gradient, ``degrees`` times ``tr
            S`` on average; ``|g|**2`` of this process's gradient; ``sum_k n_k |c_k - g|**2 / (K -
            1)`` of clusters of features; and the mean of ``(n_k1 n_k2 / n_k) |c_k1 - c_k2|**2``
            over those with two halves.
        """
        assert self._sizes is not None
        rows = {name: row for row, name in enumerate(names)}
        blocks = torch.stack(self._norms).double().square()
        owners = torch.tensor([rows[name] for name in self._owners]).to(blocks.device)
        squares = blocks.new_zeros(len(names), blocks.shape[1]).index_add_(0, owners, blocks)
        missing = [rows[n] for n in names if n not in self.known or n in self.unknown]
        squares[missing] = torch.nan
        return self._sizes.figures(squares)


def _taken(whole: Tensor, param: Tensor) -> Taken:
    gradient = whole.to(param.dtype)
    return Taken(gradient, gradient)


class _Sizes:
    """The sizes of groups, by which norms of sums become figures.

    Args:
        groups: the groups.
        halves: whether groups 2k and 2k + 1 are halves of cluster k.
    """

    def __init__(self, groups: Groups, halves: bool) -> None:
        self.groups, self._halves, self._batch = groups, halves, len(groups.labels)
        self._sizes = groups.offsets.diff().double()
        if halves:
            self._sizes = self._sizes.view(-1, 2)
        self._whole = self._sizes.sum(dim=1) if halves else self._sizes
        self._shares: dict[torch.dtype, Tensor] = {}

    def norms(self, sums: Tensor, total: Tensor) -> Tensor:
        """Return norms of a block: of K clusters, of K differences, of 1 total, of K halves.

        Args:
            sums: gradients summed by group, ``(K, E)`` or ``(2 K, E)``; they are not changed.
            total: their sum, ``(E,)``.
        """
        shares = self._shares.get(sums.dtype)
        if shares is None:
            shares = self._shares[sums.dtype] = (self._whole / self._batch).to(sums.dtype)
        clusters, apart = sums, []
        if self._halves:
            pairs = sums.unflatten(0, (-1, 2))
            clusters = pairs.sum(dim=1)
            half = (self._sizes / self._whole[:, None].clamp(min=1)).to(sums.dtype)
            # (c_k1 - c_k2) n_k1 n_k2 / (n_k B)
            apart = [_norms(pairs[:, 0] * half[:, 1:] - pairs[:, 1] * half[:, :1])]
        around = torch.addr(clusters, shares, total, alpha=-1)
        return torch.cat([_norms(clusters), _norms(around), _norms(total[None]), *apart])

    def figures(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``Squares.figures`` does, from the squared norms of parameters."""
        k, whole = len(self._whole), self._whole.clamp(min=1)
        clusters, around, square, apart = squares.split([k, k, 1, squares.shape[1] - 2 * k - 1], 1)
        norms = clusters.nan_to_num(nan=0.0).sum(dim=0).sqrt() * (self._batch / whole)
        spread = (around / whole).sum(dim=1) * self._batch**2
        if not self._halves:
            none = torch.full_like(spread, torch.nan)
            return torch.stack([spread, square[:, 0], none, none], dim=1), norms
        product = self._sizes.prod(dim=1)
        variances = apart * (self._batch**2 * whole / product.clamp(min=1) * (product > 0))
        between = spread / ((self._whole > 0).sum() - 1)
        within = variances.sum(dim=1) / (product > 0).sum()
        spread = spread + (variances * (whole - 1)).sum(dim=1)
        return torch.stack([spread, square[:, 0], between, within], dim=1), norms


def _norms(rows: Tensor) -> Tensor:
    """Return the norms of rows ``(K, E)``, ``(K,)`` in float32 or wider."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, dim=1, dtype=None if wide == rows.dtype else wide)
