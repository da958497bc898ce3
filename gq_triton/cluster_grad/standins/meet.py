"""The meeting of stand-ins and samples: a stand-in is expanded, and its gradient comes by sample.

Shapes: B samples, n rows of samples (a multiple of B), K clusters, S the shape of a stand-in.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gq_triton.cluster_grad import passes
from gq_triton.cluster_grad.compiled_ops import autocast_of, exact, param_grads, traced_whole, use
from gq_triton.cluster_grad.forming import Sums
from gq_triton.cluster_grad.layers.embedding import EMBEDDING
from gq_triton.cluster_grad.layers.rows import accumulation_type, add_rows_, launches_cost
from gq_triton.cluster_grad.site import (
    Block,
    Call,
    Family,
    Site,
    UnknownRows,
    site_of,
    whole_block,
)
from gq_triton.cluster_grad.standins.origin import OTHER, Origin, Root
from gq_triton.cluster_grad.step import Step
from gq_triton.engines import engine
from gq_triton.ring import flat

__all__ = ["EXPANDED", "LOOKED_UP", "expanded", "routed", "tapped"]


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, param: Tensor, rows: int, indices: Tensor | None, call: Call
    ) -> Tensor:
        ctx.call, ctx.params = call, (param,)
        if indices is not None:
            ctx.save_for_backward(indices)
        return values.expand(rows, *values.shape[1:])

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *param_grads(ctx, grad_outputs[0], *ctx.saved_tensors), None, None, None


@traced_whole
def _expand(values: Tensor, param: Tensor, rows: int, indices: Tensor | None, call: Call) -> Tensor:
    return _Expand.apply(values, param, rows, indices, call)  # pyright: ignore[reportReturnType]


def expanded(values: Tensor, origin: Origin, rows: int) -> Tensor:
    """Return a stand-in expanded to ``(n, *S[1:])``, with its gradients summed by cluster.

    Args:
        values: ``(1, *S[1:])`` or ``(n, *S[1:])``, the stand-in as an ordinary tensor.
        origin: where it comes from.
        rows: n.
    """
    if origin.link == OTHER:
        routed_values, call = routed(values, origin, EXPANDED)
        return _expand(routed_values, routed_values, rows, None, call)
    root = origin.roots[0]
    key = root.sites["looked up" if root.indices is not None else "expanded"]
    use(origin.clock, origin.token, key, torch.is_grad_enabled())
    return _expand(values, root.param, rows, root.indices, (origin.token, key))


def _by_cluster(step: Step, grad: Tensor, backend: str) -> Tensor:
    """Return the sums ``(K, N)`` of a gradient ``(n, ...)`` with N numbers per row."""
    groups = step.groups
    batch = groups.labels.numel()
    if len(grad) % batch:
        raise UnknownRows(f"it met {len(grad)} rows, which are no multiple of {batch} samples")
    rows = grad.reshape(batch, len(grad) // batch, -1)
    ops = engine(grad.device, backend)
    return ops.position_sums(rows, groups.order, groups.offsets)[0]


def _expanded_gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of a parameter that was expanded over the samples."""
    (grad,), param = tensors, site.param(wanted[0])
    if grad[0].numel() != param.numel():  # a route whose values have a row per row of samples
        groups = step.groups
        per_row = groups.members.repeat_interleave(len(grad) // groups.labels.numel(), dim=1)
        wide = grad.to(accumulation_type(grad.dtype)).reshape(len(grad), -1)
        sums = (wide * per_row[:, :, None]).flatten(1)
    else:
        sums = _by_cluster(step, grad, site.collector.backend)
    if not param.is_contiguous():
        sums = torch.stack([flat(part.view(param.shape), like=param) for part in sums])
    return [site.give(step, wanted[0], iter([(0, param.numel(), sums)]), sums.dtype)]


def _looked_up_gradients(
    site: Site, step: Step, tensors: list[Tensor], wanted: list[int]
) -> list[Tensor | None]:
    """Give the sums of a table whose rows the model looked up once for all samples, or for each."""
    grad, indices = tensors
    columns = site.param(0).shape[1]
    each = indices.dim() > 0 and len(indices) == len(grad)
    if each and grad.numel() == indices.numel() * columns:
        rows = grad.reshape(len(indices), -1, columns)
        return EMBEDDING.gradients(site, step, [rows, indices], wanted)
    sums = _by_cluster(step, grad, site.collector.backend).unflatten(1, (indices.numel(), -1))
    return [_give_table(site, step, sums, indices, site.module)]


def _give_table(
    site: Site, step: Step, sums: Tensor, indices: Tensor, module: nn.Module
) -> Tensor | None:
    """Give the sums ``(K, lookups, d)`` of looked up rows of the site's table ``(V, d)``."""
    param, padding = site.param(0), getattr(module, "padding_idx", None)
    where = indices.flatten()
    rows, contiguous = param.shape[0], param.is_contiguous()
    few = contiguous and rows > where.numel() and site.used_once(step, 0)
    touched = None
    if few and not launches_cost(sums):  # the host would wait for the number of touched rows
        touched, where = where.unique(return_inverse=True)
        rows = len(touched)
    table = sums.new_zeros(len(sums), rows, sums.shape[2])
    place = where + rows * torch.arange(len(sums), device=where.device)[:, None]
    add_rows_(table.view(-1, sums.shape[2]), place.flatten(), sums.flatten(0, 1))
    if padding is not None and touched is not None:
        table.masked_fill_((touched == padding)[None, :, None], 0)
    elif padding is not None:
        table[:, padding] = 0
    if touched is not None:
        return site.give_rows(step, 0, touched, table.flatten(1))
    total = (
        table.flatten(1) if contiguous else torch.stack([flat(part, like=param) for part in table])
    )
    return site.give(step, 0, iter([(0, param.numel(), total)]), total.dtype)


def _no_forward(*args: Any) -> Tensor:
    raise AssertionError("the site of a stand-in runs no forward pass of its own")


EXPANDED = Family(_no_forward, _expanded_gradients)
LOOKED_UP = Family(_no_forward, _looked_up_gradients)


class _Route(Site):
    """The site of a tensor computed from parameters, whose sums go back through the computation.

    Args:
        values: the tensor, with its graph.
        origin: the parameters it is computed from.
        family: the family that sums the gradients of ``values``.
    """

    def __init__(self, values: Tensor, origin: Origin, family: Family) -> None:
        self._sites = [_site(root) for root in origin.roots]
        first = self._sites[0]
        super().__init__(first.collector, first.name or "the model", first.module, family)
        self.values, self.origin = values, origin
        self.sums: Tensor | None = None
        self.marker: Tensor | None = None

    def param(self, position: int) -> Tensor:
        """Return the computed tensor, in the place of a parameter."""
        return self.values.detach()

    def used_once(self, step: Step, position: int) -> bool:
        """Return False: the sums must be those of the whole tensor."""
        return False

    def take_unknown(self, position: int, reason: str) -> None:
        """Note why the gradients of all parameters behind the tensor are not known by cluster."""
        for site in self._sites:
            site.take_unknown(0, reason)

    def give(
        self, step: Step, position: int, blocks: Iterator[Block], dtype: torch.dtype
    ) -> Tensor | None:
        """Keep the sums until autograd reaches the computation; return a marker."""
        self.step = step
        shape = step.groups.n_clusters, self.values.numel()
        sums = torch.empty(shape, dtype=dtype, device=self.values.device)
        for start, stop, part in blocks:
            sums[:, start:stop] = part
        self.sums = sums if self.sums is None else self.sums + sums
        if self.marker is None:
            self.marker = self.values.new_zeros(()).expand_as(self.values)
        return self.marker

    def give_whole(self, step: Step, position: int, sums: Tensor) -> Tensor | None:
        """Keep the sums as ``give`` does."""
        return self.give(step, position, whole_block(sums), sums.dtype)

    def give_sums(self, step: Step, position: int, sums: Sums, scale: bool) -> Tensor | None:
        """Keep the sums as ``give`` does."""
        return self.give(step, position, sums.blocks(scale), sums.dtype)

    def finish(self, total: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradient of the computation and those of its roots.

        Args:
            total: what autograd has for the computation's gradient.
        """
        nothing: list[Tensor | None] = [None for _ in self._sites]
        sums, self.sums = self.sums, None
        if sums is None:
            return total, nothing
        parts = sums.to(self.values.dtype).view(-1, *self.values.shape)
        if total is not self.marker:  # part of the gradient came in another way
            return total + parts.sum(dim=0), nothing
        starts = list(self.origin.starts)
        found: list[list[Tensor | None]] = []
        for part in parts:
            grads = torch.autograd.grad(
                self.values, starts, part, retain_graph=True, allow_unused=True
            )
            found.append(list(grads))
        results: list[Tensor | None] = []
        for place, (site, root) in enumerate(zip(self._sites, self.origin.roots, strict=True)):
            grads = [grads[place] for grads in found]
            results.append(_deliver(site, root, self.step, grads) if None not in grads else None)
        return None, results


def _deliver(site: Site, root: Root, step: Step, grads: list[Any]) -> Tensor | None:
    """Give a root's gradients of all clusters, K times the shape of the root."""
    wide = accumulation_type(grads[0].dtype)
    if root.indices is not None:
        sums = torch.stack([grad.to(wide).reshape(root.indices.numel(), -1) for grad in grads])
        return _give_table(site, step, sums, root.indices, site.module)
    sums = torch.stack([flat(grad.to(wide), like=root.param) for grad in grads])
    return site.give(step, 0, iter([(0, root.param.numel(), sums)]), wide)


def _site(root: Root) -> Site:
    site = site_of(root.sites["looked up" if root.indices is not None else "expanded"])
    assert site is not None
    return site


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, route: _Route, *params: Tensor) -> Tensor:
        ctx.route = route
        return values.view_as(values)

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        values, results = ctx.route.finish(grad_outputs[0])
        return values, None, *results


def routed(values: Tensor, origin: Origin, family: Family) -> tuple[Tensor, Call]:
    """Return a tensor computed from parameters, for an operation that treats it as a parameter.

    Args:
        values: the tensor, with its graph.
        origin: the parameters it is computed from.
        family: the family that sums its gradients.

    Returns:
        The values for the operation and its call.
    """
    route = _Route(values.contiguous(), origin, family)
    for root in origin.roots:
        key = root.sites["looked up" if root.indices is not None else "expanded"]
        use(origin.clock, origin.token, key, torch.is_grad_enabled())
    params = [root.param for root in origin.roots]
    out: Any = _Routed.apply(route.values, route, *params)
    return out, (origin.token, route.key)


class _Tapped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, again: Callable[..., Tensor], calls: Any, *values: Tensor
    ) -> Tensor:
        ctx.again, ctx.calls, ctx.values = again, calls, values
        return out.view_as(out)

    @staticmethod
    @exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        step = passes.enter(*ctx.calls[0])[1]
        groups = step.groups
        batch = groups.labels.numel()
        values = [value.detach().requires_grad_() for value in ctx.values]
        with torch.enable_grad():
            out = ctx.again(values)
        unknown = step.mismatch or (
            f"it met {len(grad)} rows, which are no multiple of {batch} samples"
            if len(grad) % batch
            else ""
        )
        if unknown:
            for call in ctx.calls:
                route = site_of(call[1])
                assert route is not None
                route.take_unknown(0, unknown)
            return grad, None, None, *torch.autograd.grad(out, values, grad)
        rows = groups.members.repeat_interleave(len(grad) // batch, dim=1).to(grad.dtype)
        parts: list[list[Tensor]] = [[] for _ in values]
        for members in rows:
            masked = grad * members.view(-1, *[1] * (grad.dim() - 1))
            found = torch.autograd.grad(out, values, masked, retain_graph=True)
            for sums, part in zip(parts, found, strict=True):
                sums.append(part.flatten())
        results = []
        for call, sums, value in zip(ctx.calls, parts, values, strict=True):
            route = site_of(call[1])
            assert route is not None
            total = torch.stack(sums)
            total = total.to(accumulation_type(total.dtype))
            results.append(route.give(step, 0, iter([(0, value.numel(), total)]), total.dtype))
        return grad, None, None, *results


def tapped(
    func: Callable[..., Tensor], stand_ins: list[tuple[Tensor, Origin]],
    arguments: Callable[[list[Tensor]], tuple[Any, Any]], rows: int,
) -> Tensor | None:  # fmt: skip
    """Run an operation of stand-ins and samples whose result has the samples in dimension 0.

    The gradients of the stand-ins by cluster are products with the result's gradient, masked by
    cluster: K of them.

    Args:
        func: the operation.
        stand_ins: the stand-ins as ordinary tensors, and where they come from.
        arguments: returns the operation's arguments, given tensors in place of the stand-ins.
        rows: the number of rows of samples.

    Returns:
        The result; None if nothing tells which of its dimensions is that of the samples.
    """
    args, kwargs = arguments([values.detach() for values, _ in stand_ins])
    out = func(*args, **kwargs)
    if out.shape[0] != rows or list(out.shape).count(rows) > 1:
        return None
    given = [routed(values, origin, EXPANDED) for values, origin in stand_ins]
    values = [value for value, _ in given]
    autocast = autocast_of(out.device.type)

    def again(these: list[Tensor]) -> Tensor:
        args, kwargs = arguments(these)
        args, kwargs = tree_map_only(
            Tensor, lambda t: t if _any(t, these) else t.detach(), (args, kwargs)
        )
        with autocast():
            return func(*args, **kwargs)

    tapped_out: Any = _Tapped.apply(out, again, [call for _, call in given], *values)
    return tapped_out


def _any(tensor: Tensor, among: list[Tensor]) -> bool:
    return any(tensor is other for other in among)
