# A training script of your own for `gq-triton study run --command`, which reads its last line.

import argparse
import json

import torch
from sklearn.datasets import load_wine

from gq_triton import GradQueue

parser = argparse.ArgumentParser()
for name in ("lr", "beta1", "rho"):
    parser.add_argument(f"--{name}", type=float)
for name in ("batch-size", "seed", "queue-length"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--law", choices=["none", "queue"])
given = parser.parse_args()

inputs, labels = (torch.tensor(part) for part in load_wine(return_X_y=True))
inputs = ((inputs - inputs.mean(0)) / inputs.std(0)).float()
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, validation, test = order[:90], order[90:134], order[134:]

torch.manual_seed(given.seed)
model = torch.nn.Linear(13, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=given.lr, momentum=given.beta1)
queue = None
if given.law == "queue":
    queue = GradQueue(model, rho=given.rho, queue_length=given.queue_length)
    queue.attach(optimizer)

measured = []
for _ in range(30):
    batch = train[torch.randint(len(train), (given.batch_size,))]
    loss = torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if queue is not None:
        measured.append(queue.metrics())


def accuracy(part):
    return (model(inputs[part]).argmax(1) == labels[part]).double().mean().item()


scores = {"validation_score": accuracy(validation), "test_score": accuracy(test)}
for name in ("norm_ratio", "mean_weight") if measured else ():
    scores[name] = sum(float(one[name]) for one in measured) / len(measured)
print(json.dumps(scores))
