"""The checks of Lightning, Accelerate and the Trainer on two ranks; see test_frameworks.py.

The examples of docs/frameworks.md are run as they stand there.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from gq_triton import GradQueue
from gq_triton.dist import register

PAGE = Path(__file__).resolve().parents[2] / "docs" / "frameworks.md"
OPTIONS: dict[str, Any] = {"rho": 3.0, "queue_length": 3, "backend": "torch"}
EPOCH = 5  # steps of each rank
Result = tuple[nn.Module, Any]  # a GradQueueState, or a GradQueue on one device


def example(word: str, **names: Any) -> dict[str, Any]:
    """Run the page's one code block that contains a word; return the names it leaves."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(2 * EPOCH * 4, 6, generator=generator))


def check_trained(result: Result, start: nn.Module, steps: int) -> None:
    """Assert that every step was queued and weighted, and that the ranks have one queue."""
    model, state = result
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, state.digest())
    assert len(set(digests)) == 1, "the ranks' queues differ"
    assert {int(count) for count in state.state_dict()["queued"].values()} == {steps}
    assert state.metrics()["mean_weight"] != 1
    before, after = start.state_dict(), model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name, _ in start.named_parameters())


def check_same(resumed: Result, whole: Result) -> None:
    for (name, ours), theirs in zip(
        resumed[0].named_parameters(), whole[0].parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert resumed[1].digest() == whole[1].digest()


# --- Lightning


def check_lightning(rank: int, folder: str) -> None:
    whole = lightning_run(folder, epochs=2, path=None)
    check_trained(whole, network(), 2 * EPOCH)
    first = Path(folder, "lightning", f"epoch=0-step={EPOCH}.ckpt")
    resumed = lightning_run(None, epochs=2, path=first)
    check_trained(resumed, network(), 2 * EPOCH)
    check_same(resumed, whole)


def lightning_run(folder: str | None, epochs: int, path: Path | None, devices: int = 2) -> Result:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    callback = example("class GradQueueCallback")["GradQueueCallback"](**OPTIONS)
    callbacks = [callback]
    if folder is not None:
        callbacks.append(ModelCheckpoint(dirpath=Path(folder, "lightning"), save_top_k=-1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=epochs,
        callbacks=callbacks,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(samples(), batch_size=4), ckpt_path=path, weights_only=True)
    return module.net, callback.state


def check_fabric(rank: int, folder: str) -> None:
    path = Path(folder, "fabric.ckpt")
    whole = fabric_run(path, resume=False)
    check_trained(whole, network(), 2 * EPOCH)
    resumed = fabric_run(path, resume=True)
    check_trained(resumed, network(), 2 * EPOCH)
    check_same(resumed, whole)


def fabric_run(path: Path, resume: bool) -> Result:
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    net = network()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    state = register(model, **OPTIONS)
    loader = fabric.setup_dataloaders(DataLoader(samples(), batch_size=4))
    everything = {"model": model, "optimizer": optimizer, "queue": state}
    if resume:
        fabric.load(path, everything)
    for epoch in range(int(resume), 2):
        for (batch,) in loader:
            optimizer.zero_grad()
            fabric.backward(model(batch).square().mean())
            optimizer.step()
        if epoch == 0:
            fabric.save(path, everything)
    return net, state


# --- Accelerate


def check_accelerate(rank: int, folder: str) -> None:
    path = Path(folder, "accelerate")
    whole = accelerate_run(path, resume=False)
    check_trained(whole, network(), 2 * EPOCH)
    resumed = accelerate_run(path, resume=True)
    check_trained(resumed, network(), 2 * EPOCH)
    check_same(resumed, whole)


def accelerate_run(path: Path, resume: bool) -> Result:
    net = network()
    names = example(
        "Accelerator()",
        model=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        loader=DataLoader(samples(), batch_size=4),
    )
    accelerator = names["accelerator"]
    if resume:
        accelerator.load_state(path)
    for epoch in range(int(resume), 2):
        for (batch,) in names["loader"]:
            names["optimizer"].zero_grad()
            accelerator.backward(names["model"](batch).square().mean())
            names["optimizer"].step()
        if epoch == 0:
            accelerator.save_state(path)
    return net, names["state"]


# --- Transformers


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences of tokens, each its own target."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 32, (2 * EPOCH * 2, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def check_transformers(rank: int, folder: str) -> None:
    path = Path(folder, "transformers")
    whole = trainer_run(path, resume=False)
    check_trained(whole, gpt(), 2 * EPOCH)
    for checkpoint in path.glob(f"checkpoint-{2 * EPOCH}") if rank == 0 else ():
        checkpoint.rename(path / "finished")  # so that the newest is the first epoch's
    dist.barrier()
    resumed = trainer_run(path, resume=True)
    check_trained(resumed, gpt(), 2 * EPOCH)
    check_same(resumed, whole)


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config)


def trainer_run(path: Path, resume: bool) -> Result:
    from transformers import Trainer, TrainingArguments

    model = gpt()
    callback = example("class GradQueueTrainerCallback")["GradQueueTrainerCallback"](**OPTIONS)
    args = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[callback])
    callback.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return model, callback.state


# --- one device


def alone(rank: int, folder: str) -> None:
    """Run the examples in a process that belongs to no group: they attach to the optimizer."""
    dist.destroy_process_group()
    runs: dict[str, Callable[[], Result]] = {
        "lightning": lambda: lightning_run(None, epochs=1, path=None, devices=1),
        "accelerate": lambda: accelerate_run(Path(folder, "accelerate"), resume=False),
        "transformers": lambda: trainer_run(Path(folder, "transformers"), resume=False),
    }
    for name, run in runs.items():
        model, state = run()
        assert isinstance(state, GradQueue), name
        assert state.metrics()["mean_weight"] != 1, name
        named = dict(model.named_parameters())
        assert {key.removeprefix("net.") for key in state.state_dict()["queue"]} == set(named), name
    # The code that ends the process expects a group.
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def two_ranks(rank: int, folder: str) -> None:
    check_lightning(rank, folder)
    check_fabric(rank, folder)
    check_accelerate(rank, folder)
    check_transformers(rank, folder)
