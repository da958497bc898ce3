# Gradients, layers and labels are there after a backward pass, whatever their types say.
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
"""What the plug-in shows of itself: metrics and repr."""

import pytest
import torch
from plugin_cases import backward, make_model

from gq_triton import GradQueue, reference


def test_metrics_say_what_the_law_did():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    queue = GradQueue(model, queue_length=3)
    queue.attach(optimizer)
    assert queue.metrics() == {}
    history = []
    for step in range(6):
        backward(model, step)
        raw = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        history.append(raw)
    weights = torch.cat(
        [
            reference.scarcity_weight(g, torch.stack([h[i] for h in history[2:5]])).flatten()
            for i, g in enumerate(history[5])
        ]
    )
    flat = torch.cat([g.flatten() for g in history[5]])
    metrics = queue.metrics()
    assert metrics["mean_weight"] == pytest.approx(float(weights.mean()), rel=1e-6)
    assert metrics["norm_ratio"] == pytest.approx(
        float((weights * flat).norm() / flat.norm()), rel=1e-6
    )
    assert metrics["saturated_high"] == pytest.approx(float((weights == 3).double().mean()))
    assert metrics["saturated_low"] == pytest.approx(float((weights == 1 / 3).double().mean()))
    assert metrics["effective_length"] == 3
    assert metrics["cluster_sizes"] is None
    layers = queue.metrics(per_layer=True)
    assert list(layers) == [name for name, _ in model.named_parameters()]
    for (name, param), w in zip(
        model.named_parameters(), weights.split([g.numel() for g in history[5]]), strict=True
    ):
        raw = history[5][list(layers).index(name)].flatten()
        assert param.numel() == raw.numel()
        assert layers[name] == pytest.approx(
            {
                "mean_weight": float(w.mean()),
                "norm_ratio": float((w * raw).norm() / raw.norm()),
                "saturated_high": float((w == 3).double().mean()),
                "saturated_low": float((w == 1 / 3).double().mean()),
            },
            rel=1e-6,
        )


def test_repr_names_options_size_and_what_is_served():
    model = torch.nn.Linear(4, 2)
    queue = GradQueue(model, rho=2.0)
    assert repr(queue) == (
        "GradQueue(rho=2.0; 2 parameters of 10 elements, queue of 0 bytes; not attached)"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = queue.attach(optimizer)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    assert repr(queue).endswith("queue of 200 bytes; attached to SGD)")
    handle.remove()
    assert repr(queue).endswith("not attached)")
    grouped = GradQueue(torch.nn.Sequential(model), n_clusters=2, features="0")
    assert repr(grouped).startswith("GradQueue(n_clusters=2, features='0'; ")


def test_metrics_are_about_the_last_step():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    queue = GradQueue(model, queue_length=2)
    queue.attach(optimizer)
    for step in range(4):
        backward(model, step)
        for param in model[2].parameters():
            param.grad = torch.ones_like(param)
        if step == 3:
            assert queue.metrics()["mean_weight"] > 1 / 3
            model[0].weight.grad = model[0].bias.grad = None
        optimizer.step()
    assert queue.metrics()["mean_weight"] == pytest.approx(1 / 3)  # constant gradients only
