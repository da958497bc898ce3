"""K-means on the features of one batch, whose labels are Grad Queue's clusters.

It is made for training loops: the host never waits for the device, centres start where those of the
last step ended, and results are the same bit for bit every time. They are those of
``sklearn.cluster.KMeans(algorithm="lloyd", n_init=1)`` from the same start.

Ties are broken by the lowest index. A sample equally near to several centres gets the lowest label.
Of centres that coincide (to rounding) the lowest gets all samples. Of samples equally far from
their centres the lowest is relocated first.

Shapes: B samples, F features, K clusters, T candidates per k-means++ draw, M = min(B, K), any N.
"""

import math
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from gq_triton.grouping.distances import cost, nearest_centers, row_norms
from gq_triton.saved.rules import Maybe, Record, check
from gq_triton.saved.tensors import GeneratorState, TensorLike

_CENTERS = "cluster_centers"
_GENERATOR = "generator"
_NOT_FINITE = "features must be finite; KMeans(nonfinite='zero') counts NaN and infinity as 0"


class _Frame(NamedTuple):
    """The coordinates of the arithmetic: scaled, so that squares are finite, then centred.

    The scale is a power of two, so scaling rounds nothing. Centring reduces the cancellation in
    squared distances.
    """

    unit: Tensor  # () a power of two, at most the largest |feature|
    mean: Tensor  # (F,) of the scaled features

    def enter(self, centers: Tensor) -> Tensor:
        """Return centres (K, F) in these coordinates, where samples are within 4 of the origin."""
        centers = centers.to(self.mean) / self.unit - self.mean
        return centers.clamp_(-(2.0**40), 2.0**40)  # a distant one stays distant, and finite

    def leave(self, centers: Tensor) -> Tensor:
        """Return centres (K, F) in the caller's coordinates."""
        return (centers + self.mean) * self.unit


def _host_may_read(tensor: Tensor) -> bool:
    """Return whether a value can be read without a wait: on the CPU, outside traced graphs."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _host_may_ask(tensor: Tensor) -> bool:
    """Return whether events can be queried: on a GPU, outside traced and captured graphs."""
    on_gpu = tensor.is_cuda and not torch.compiler.is_compiling()
    return on_gpu and not torch.cuda.is_current_stream_capturing()


class _Notices:
    """Flags that a GPU sets, read on the host without waiting for the GPU."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def any_set(self, flag: Tensor) -> bool:
        """Request the flag, () bool; return whether a flag that has arrived by now is True."""
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((host, event))
        while self.pending and self.pending[0][1].query():
            if bool(self.pending.popleft()[0]):
                return True
        return False


def _check_features(features: Tensor, centers: Tensor | None) -> None:
    """Raise an error for features of a wrong type or shape."""
    if not features.dtype.is_floating_point:
        raise TypeError(f"features must be floating point, got {features.dtype}; call .float()")
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"features must have shape (B >= 1, F >= 1), got {tuple(features.shape)}; "
            "average or flatten positions first"
        )
    if centers is not None and centers.shape[1] != features.shape[1]:
        raise ValueError(
            f"features have {features.shape[1]} columns but the centres of this KMeans have "
            f"{centers.shape[1]}; build a new KMeans for other features"
        )


def _standardise(features: Tensor, nonfinite: str) -> tuple[Tensor, _Frame]:
    """Return features (B, F) in their frame, and the frame: float64 for float64, else float32."""
    x = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    if nonfinite == "zero":
        x = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = torch.aminmax(x)
    peak = torch.maximum(-low, high)  # NaN if any feature is
    if not _host_may_read(peak):
        torch._assert_async(peak.isfinite(), _NOT_FINITE)  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(peak.isfinite()):
        raise ValueError(_NOT_FINITE)
    mantissa, _ = torch.frexp(peak)  # in [1/2, 1): the quotient below is exact
    unit = torch.where(peak > 0, peak / (2 * mantissa), 1.0)
    x = x / unit
    mean = x.mean(0)
    return x.sub_(mean), _Frame(unit, mean)


def _assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels (B,) int64 of x's nearest centres, and the squared distances (B,)."""
    # Of centres that are equal up to the rounding of a mean only the first gets samples. So
    # rounding cannot spread equal samples over several labels.
    reach = 64 * torch.finfo(x.dtype).eps * centers.abs().amax(1, keepdim=True)
    same = torch.cdist(centers, centers, p=math.inf) <= reach
    distinct = same.int().argmax(1) == torch.arange(len(centers), device=x.device)
    return nearest_centers(x, centers, distinct)


def _relocate(
    x: Tensor, norms: Tensor, centers: Tensor, labels: Tensor, nearest: Tensor, members: Tensor
) -> Tensor:
    """Return memberships (K, B) after each empty cluster took a sample far from its centre.

    This is scikit-learn's rule: the samples farthest from their centres move. A sample whose
    squared distance is below the resolution ``eps * ||x||^2`` stays, so with fewer distinct samples
    than clusters some clusters remain empty.
    """
    empty = ~members.any(1)
    if _host_may_read(empty) and not bool(empty.any()):
        return members
    # M candidates by the distances of the product, then exact distances for these. The sorts are
    # stable, so the lowest index comes first.
    far = nearest.sort(descending=True, stable=True).indices[: len(empty)]
    gap = x.index_select(0, far) - centers.index_select(0, labels.index_select(0, far))
    gap, order = row_norms(gap).sort(descending=True, stable=True)
    far = far.index_select(0, order)
    far = torch.where(gap > torch.finfo(x.dtype).eps * norms.index_select(0, far), far, -1)
    # The e-th empty cluster takes the e-th farthest sample, if there is one.
    rank = empty.cumsum(0) - 1
    sample = far.index_select(0, rank.clamp(0, len(far) - 1))
    sample = torch.where(empty & (rank < len(far)), sample, -1)
    moved = torch.arange(len(x), device=x.device) == sample[:, None]
    return torch.where(moved.any(0), moved, members)


def _update(x: Tensor, norms: Tensor, centers: Tensor, labels: Tensor, nearest: Tensor) -> Tensor:
    """Return the means (K, F), without atomics; an empty cluster gets the largest one's mean."""
    members = labels == torch.arange(len(centers), device=x.device)[:, None]  # (K, B)
    members = _relocate(x, norms, centers, labels, nearest, members)
    sizes = members.sum(1)
    means = members.to(x.dtype) @ x / sizes.clamp(min=1)[:, None]
    largest = means.index_select(0, sizes.argmax().view(1))
    return torch.where((sizes > 0)[:, None], means, largest)


def _lloyd(x: Tensor, centers: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
    """Return the final centres (K, F), and the iterations until convergence () int64."""
    norms = row_norms(x)
    limit = tol * norms.sum() / x.numel()
    done = torch.zeros((), dtype=torch.bool, device=x.device)
    n_iter = torch.zeros((), dtype=torch.int64, device=x.device)
    notices, may_ask = _Notices(), _host_may_ask(x)
    previous = torch.full_like(norms, -1, dtype=torch.int64)
    for _ in range(max_iter):
        labels, nearest = _assign(x, centers)
        moved = _update(x, norms, centers, labels, nearest)
        n_iter = n_iter + ~done
        shift = (moved - centers).square().sum()
        centers = torch.where(done, centers, moved)
        done = done | (labels == previous).all() | (shift <= limit)
        previous = labels
        # Iterations after convergence do not change the centres: stopping early saves launches.
        if bool(done) if _host_may_read(done) else may_ask and notices.any_set(done):
            break
    return centers, n_iter


def _plus_plus(x: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Return K of the samples (B, F) by greedy k-means++ (Arthur and Vassilvitskii 2007).

    Each seed is the best of T candidates, which are drawn in proportion to the squared distances to
    the seeds so far. The distances are cumulated as integers, which are exact in any order of
    summation, so the seeds are reproducible on a GPU.
    """
    shape = n_clusters, 2 + int(math.log(n_clusters))
    draws = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
    draws = draws.to(x.device, non_blocking=True)  # the host does not wait
    norms = row_norms(x)[:, None]
    chosen = [(draws[0, :1] * len(x)).long()]
    closest = (cost(x, x[chosen[0]]) + norms).clamp_(min=0)  # (B, 1)
    for draw in draws[1:]:
        peak = closest.max()
        share = closest[:, 0] / torch.where(peak > 0, peak, 1.0)
        cumulated = (share.double() * 2**32).long().cumsum(0)
        hits = torch.searchsorted(cumulated, (draw * cumulated[-1]).long(), right=True)
        hits = hits.clamp_(max=len(x) - 1)  # (T,)
        trial = (cost(x, x[hits]) + norms).clamp_(min=0).minimum(closest)  # (B, T)
        best = trial.sum(0).argmin().view(1)
        closest = trial.index_select(1, best)
        chosen.append(hits[best])
    return x[torch.cat(chosen)]


class KMeans:
    """K-means with scikit-learn's names; ``kmeans(features)`` returns labels.

    On a GPU nothing in ``fit`` waits for the device: iterations are launched until the host sees
    that one has converged, and those after convergence do not change the centres. On the CPU the
    loop ends at convergence, with the same result. Autocast has no effect here. TF32 has, where it
    is switched on for float32 products.

    k-means++ draws from this object's own generator, which is on the CPU for every device and is
    not reset: a second start differs from the first. Global generators are left alone.

    Args:
        n_clusters: K >= 1. If K exceeds the number of distinct samples, the surplus clusters are
            empty: their size is 0, and their centres repeat another one.
        init: "k-means++", or the centres (K, F) to start from.
        max_iter: Lloyd iterations, >= 1; few are enough with a warm start.
        tol: converged once the squared shift of all centres is at most tol times the mean variance
            of a feature (scikit-learn's definition), or no label changes.
        random_state: seed of the generator.
        warm_start: start from the centres of the last fit, or the loaded ones, if there are any.
            Features drift slowly, so this saves most iterations, and the K - 1 sequential draws of
            k-means++. False starts from ``init`` every time.
        nonfinite: "raise" an error for NaN or infinite features, or replace such values by "zero",
            for features that overflow now and then under a loss scaler.

    Attributes:
        labels_: (B,) int64, the label of each sample's nearest centre.
        cluster_centers_: (K, F) float32, float64 for float64 features; never written in place.
        cluster_sizes_: (K,) int64, sums to B.
        inertia_: (), the sum of squared distances to the nearest centres, in the centres' dtype.
        n_iter_: () int64, iterations until convergence. ``fit`` sets all these attributes, on the
            device of the features.

    Raises:
        TypeError: ``n_clusters``, ``max_iter`` or ``random_state`` is no integer.
        ValueError: an argument out of its range, or ``init`` not finite and (K, F).

    Example:
        >>> import torch
        >>> kmeans = KMeans(2)
        >>> labels = kmeans(torch.tensor([[0.0, 1.0], [8.0, 8.0], [0.0, 2.0]]))
        >>> bool(labels[0] == labels[2]), bool(labels[0] == labels[1])
        (True, False)
        >>> sorted(kmeans.cluster_centers_.tolist())
        [[0.0, 1.5], [8.0, 8.0]]
    """

    labels_: Tensor
    cluster_centers_: Tensor
    cluster_sizes_: Tensor
    inertia_: Tensor
    n_iter_: Tensor

    def __init__(
        self,
        n_clusters: SupportsIndex,
        *,
        init: Literal["k-means++"] | Tensor | Sequence[Sequence[float]] = "k-means++",
        max_iter: SupportsIndex = 10,
        tol: float = 1e-4,
        random_state: SupportsIndex = 0,
        warm_start: bool = True,
        nonfinite: Literal["raise", "zero"] = "raise",
    ) -> None:
        self.n_clusters = operator.index(n_clusters)
        self.max_iter = operator.index(max_iter)
        self.tol = float(tol)
        self.random_state = operator.index(random_state)
        self.warm_start = bool(warm_start)
        self.nonfinite = nonfinite
        for name, value in (("n_clusters", self.n_clusters), ("max_iter", self.max_iter)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= self.tol < math.inf:
            raise ValueError(f"tol must be finite and >= 0, got {tol}")
        if nonfinite not in ("raise", "zero"):
            raise ValueError(f"nonfinite must be 'raise' or 'zero', got {nonfinite!r}")
        if isinstance(init, str) and init != "k-means++":
            raise ValueError(f"init must be 'k-means++' or an array of centres, got {init!r}")
        self.init = init if isinstance(init, str) else self._checked_centers(init, "init")
        self._generator = torch.Generator().manual_seed(self.random_state)

    def fit_predict(self, features: Tensor) -> Tensor:
        """Call ``fit``; return ``labels_``, (B,) int64 on the features' device."""
        return self.fit(features).labels_

    __call__ = fit_predict

    @torch.no_grad()
    def fit(self, features: Tensor) -> "KMeans":
        """Cluster one batch.

        Args:
            features: (B, F), a row per sample, of any floating dtype and device; detached here.
                float16 and bfloat16 are computed in float32.

        Returns:
            This object, with its attributes set.

        Raises:
            TypeError: features are not floating point.
            ValueError: features are not (B, F) with B, F >= 1, have another F than the centres to
                start from, or hold a NaN or an infinity.
            RuntimeError: features on a CUDA device hold a NaN or an infinity. The error comes from
                ``torch._assert_async`` at the next synchronisation. After it, as after every
                device-side assertion, the process cannot use the device.
        """
        start = None if isinstance(self.init, str) else self.init
        if self.warm_start:
            start = getattr(self, "cluster_centers_", start)
        _check_features(features, start)
        with torch.autocast(device_type=features.device.type, enabled=False):
            x, frame = _standardise(features, self.nonfinite)
            new = start is None
            seeds = _plus_plus(x, self.n_clusters, self._generator) if new else frame.enter(start)
            centers, self.n_iter_ = _lloyd(x, seeds, self.max_iter, self.tol)
            self.cluster_centers_ = frame.leave(centers)
            centers = frame.enter(self.cluster_centers_)  # as in predict, for the same labels
            self.labels_ = _assign(x, centers)[0]
            clusters = torch.arange(self.n_clusters, device=x.device)
            self.cluster_sizes_ = (self.labels_ == clusters[:, None]).sum(1)
            gaps = x.sub_(centers.index_select(0, self.labels_))
            self.inertia_ = row_norms(gaps).sum() * frame.unit * frame.unit
        return self

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Return the labels (B,) int64 of features (B, F) by the present centres.

        Raises:
            TypeError: as ``fit``.
            ValueError: as ``fit``.
            RuntimeError: there are no centres yet; or as ``fit``.
        """
        centers: Tensor | None = getattr(self, "cluster_centers_", None)
        if centers is None:
            raise RuntimeError("KMeans has no centres yet; call fit or load_state_dict first")
        _check_features(features, centers)
        with torch.autocast(device_type=features.device.type, enabled=False):
            x, frame = _standardise(features, self.nonfinite)
            return _assign(x, frame.enter(centers))[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the centres (None before a fit) and the generator's state, for a resumed run."""
        centers = getattr(self, "cluster_centers_", None)
        return {_CENTERS: centers, _GENERATOR: self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, with tensors on any device.

        Raises:
            ValueError: the state is not one of a KMeans with this K. Nothing is changed.
        """
        self.check_saved(state)
        centers = state[_CENTERS]
        self._generator.set_state(state[_GENERATOR].cpu().contiguous())
        for name in [name for name in vars(self) if name.endswith("_")]:
            delattr(self, name)  # what an earlier fit left
        if centers is not None:
            self.cluster_centers_ = centers.detach().clone()

    def check_saved(self, state: Any) -> None:
        """Raise a ValueError that names what keeps a saved state from being loaded."""
        centers = TensorLike((self.n_clusters, None), (torch.float32, torch.float64), finite=True)
        rules = {_CENTERS: Maybe(centers), _GENERATOR: GeneratorState()}
        check(state, Record(rules), "the saved KMeans")

    def _checked_centers(self, array: Tensor | Sequence[Sequence[float]], name: str) -> Tensor:
        """Return a private copy of centres (K, F) that the user gave."""
        centers = torch.as_tensor(array).detach().clone()
        if not centers.dtype.is_floating_point:
            centers = centers.double()
        if centers.ndim != 2 or len(centers) != self.n_clusters or not centers.numel():
            raise ValueError(
                f"{name} must have shape ({self.n_clusters}, features), got {tuple(centers.shape)}"
            )
        if not bool(centers.isfinite().all()):
            raise ValueError(f"{name} must be finite, got a NaN or an infinity")
        return centers
