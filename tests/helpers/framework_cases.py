"""Models, data and common checks of the frameworks' tests; see framework_checks.py."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

OPTIONS: dict[str, Any] = {"rho": 3.0, "queue_length": 3, "backend": "torch"}
EPOCH = 5  # steps of each rank
Result = tuple[nn.Module, Any]  # a GradQueueState, or a GradQueue on one device


def clustered(features: str) -> dict[str, Any]:
    return OPTIONS | {"n_clusters": 2, "features": features}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(2 * EPOCH * 4, 6, generator=generator))


def check_trained(result: Result, start: nn.Module, steps: int) -> None:
    """Assert that every step was queued and weighted, and that the ranks have one queue."""
    model, queue = result
    digest = queue.digest()
    if dist.is_initialized():
        digests = [None] * dist.get_world_size()
        dist.all_gather_object(digests, digest)
        assert len(set(digests)) == 1, "the ranks' queues differ"
    assert {int(count) for count in queue.state_dict()["queued"].values()} == {steps}
    assert queue.metrics()["mean_weight"] != 1
    before, after = start.state_dict(), model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name, _ in start.named_parameters())


def check_same(resumed: Result, whole: Result) -> None:
    for (name, ours), theirs in zip(
        resumed[0].named_parameters(), whole[0].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert resumed[1].digest() == whole[1].digest()


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences of tokens, each its own target."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 32, (2 * EPOCH * 2, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Words(nn.Module):
    """A model of layers that clusters know, with the inputs and outputs of a Trainer's model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body, self.head = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(self.table(input_ids)).tanh())
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)
