"""The options of every door are those of options.py: one default, one check, one help sentence."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from torch import nn

from gq_triton import GQSGD, GQAdamW, GradQueue
from gq_triton.dist import GradQueueState, register
from gq_triton.dist.options import NOT_ON_RANKS, HookKeywords, HookOptions, StateKeywords
from gq_triton.grad_queue import PlugInKeywords
from gq_triton.keywords import help_of
from gq_triton.options import ClusterKeywords, ClusterOptions, LawKeywords, LawOptions, option

PAIRS = {
    LawOptions: LawKeywords,
    ClusterOptions: ClusterKeywords,
    HookOptions: HookKeywords,
}
ON_RANKS = ClusterOptions, LawOptions, HookOptions
DOORS = {
    GQSGD: (LawOptions,),
    GQAdamW: (LawOptions,),
    GradQueue: (ClusterOptions, LawOptions),
    GradQueueState: ON_RANKS,
    register: ON_RANKS,
}
# Keywords of a door itself: those that torch.optim has too, and how its update is rounded.
SWITCHES = {"maximize", "foreach", "differentiable", "fused", "stochastic_rounding"}
OWN = {GQSGD: {"dampening", *SWITCHES}, GQAdamW: {"capturable", *SWITCHES}}


@pytest.mark.parametrize(("kind", "keywords"), PAIRS.items(), ids=lambda kind: kind.__name__)
def test_keywords_have_the_names_and_types_of_the_options(kind, keywords):
    assert get_type_hints(keywords) == get_type_hints(kind)


@pytest.mark.parametrize(
    ("door", "keywords"), [(GradQueue, PlugInKeywords), (GradQueueState, StateKeywords)]
)
def test_a_doors_keywords_are_its_options(door, keywords):
    shown = inspect.signature(door).parameters.values()
    named = {p.name: p.annotation for p in shown if p.kind is p.KEYWORD_ONLY}
    assert named == get_type_hints(keywords)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_doors_signature_shows_every_option(door):
    expected = {}
    for kind in DOORS[door]:
        hints = get_type_hints(kind)
        expected |= {entry.name: (hints[entry.name], entry.default) for entry in fields(kind)}
    if HookOptions in DOORS[door]:
        expected = {name: o for name, o in expected.items() if name not in NOT_ON_RANKS}
    shown = inspect.signature(door).parameters.values()
    named = {p.name: (p.annotation, p.default) for p in shown if p.kind is p.KEYWORD_ONLY}
    assert {n: o for n, o in named.items() if n not in OWN.get(door, ())} == expected
    assert not [p for p in shown if p.kind is p.VAR_KEYWORD]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_doors_docstring_explains_every_option(door):
    text = " ".join((inspect.getdoc(door) or "").split())
    assert "**options" not in text
    for kind in DOORS[door]:
        for name in kind.names():
            if HookOptions not in DOORS[door] or name not in NOT_ON_RANKS:
                assert f"{name}: {' '.join(help_of(kind, name).split())}" in text
    assert max(map(len, (door.__doc__ or "").splitlines())) <= 100


def model():
    return nn.Linear(3, 3)


@pytest.mark.parametrize(
    "door",
    [
        lambda **o: GQSGD(model().parameters(), 0.1, **o),
        lambda **o: GQAdamW(model().parameters(), **o),
        lambda **o: GradQueue(model(), **o),
        lambda **o: GradQueueState(model(), **o),
    ],
    ids=["GQSGD", "GQAdamW", "GradQueue", "GradQueueState"],
)
class TestEveryDoor:
    def test_names_all_problems_at_once(self, door):
        with pytest.raises(ValueError, match="rho must be") as caught:
            door(rho=0.5, queue_length=0, backend="cuda", queue_dtype=torch.int64)
        for clause in (
            "queue_length must be an integer >= 1, got 0",
            "rho must be a finite number >= 1 (1 switches the law off), got 0.5",
            'queue_dtype must be None, a floating type of 16 bits or more, or "float8", got '
            "torch.int64",
            "backend must be one of auto, triton, numba, torch, got 'cuda'",
        ):
            assert clause in str(caught.value)

    def test_refuses_an_unknown_option_by_name(self, door):
        with pytest.raises(TypeError, match="unexpected keyword argument 'roh'"):
            door(roh=2.0)


def test_problems_of_the_law_and_of_the_clusters_come_together():
    message = r"population_power must be >= 0, got -1; rho must be"
    with pytest.raises(ValueError, match=message):
        GradQueue(model(), n_clusters=2, features="", population_power=-1, rho=0)


@pytest.mark.parametrize(
    "options",
    [
        {"features": ""},
        {"clusterer": lambda features: features},
        {"mode": "microbatch"},
        {"population_power": 0.0},
        {"centroid_scale": "standard_error"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_of_clusters_needs_a_number_of_clusters(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} needs n_clusters: say how many clusters"):
        GradQueue(model(), **options)
    with pytest.raises(ValueError, match=f"features and {name} need n_clus|features needs n_clus"):
        GradQueue(model(), **{"features": ""} | options)


def test_what_describes_the_loop_or_is_the_default_needs_no_clusters():
    GradQueue(model(), accumulation_steps=4, loss_reduction="sum", population_power=1)


def test_the_default_of_min_queue_length_gives_way_to_a_short_queue():
    assert LawOptions(queue_length=2).shortest == 2
    with pytest.raises(
        ValueError, match="min_queue_length must be at most queue_length, got 4 > 2"
    ):
        LawOptions(queue_length=2, min_queue_length=4)
    with pytest.raises(
        ValueError, match="min_queue_length must be at most queue_length, got 3 > 2"
    ):
        LawOptions(queue_length=2, loss_window=2)


def test_options_cannot_be_changed():
    with pytest.raises(AttributeError, match="cannot assign"):
        LawOptions().rho = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_an_option_is_a_field_with_a_sentence():
    assert option(3, "three.").metadata["help"] == "three."
    for kind in PAIRS:
        assert [n for n in kind.names() if not help_of(kind, n).endswith(".")] == []


def test_a_queue_of_one_gradient_is_warned_of():
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="queue_length=1: .* every weight is 1/rho or rho"):
        GradQueue(model, queue_length=1)
    GradQueue(model, queue_length=1, rho=1)  # the law is off
