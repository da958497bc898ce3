# A task of your own for `gq-triton study run --task own_task:make_task`, run in this folder.

import torch
from sklearn.datasets import load_diabetes
from torch import nn


class Diabetes:
    """Progression of diabetes in 442 patients, 10 measurements each, 10-64-1 net."""

    features = "hidden"  # the submodule whose output describes a sample, for the clusters
    score_name, unit, higher = "absolute_error", "points", False
    chance = 66.0  # of the mean: a diverged run gets it
    target = 48.0  # of "steps to target"

    def data(self, seed):
        inputs, labels = load_diabetes(return_X_y=True)
        inputs = torch.tensor(inputs * 20, dtype=torch.float32)
        labels = torch.tensor(labels, dtype=torch.float32)
        order = torch.randperm(442, generator=torch.Generator().manual_seed(0))
        parts = order[:265], order[265:353], order[353:]
        return tuple((inputs[part], labels[part]) for part in parts)

    def model(self):
        model = nn.Sequential()
        model.add_module("hidden", nn.Linear(10, 64))
        model.add_module("relu", nn.ReLU())
        model.add_module("head", nn.Linear(64, 1))
        return model

    def loss(self, outputs, labels):  # one per sample
        return (outputs[:, 0] - (labels - 150) / 75).square()

    def score(self, outputs, labels):
        return (outputs[:, 0] * 75 + 150 - labels).abs().mean().item()


def make_task():
    return Diabetes()
