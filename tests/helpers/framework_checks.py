"""The checks of Lightning, Accelerate and the Trainer; see test_frameworks.py.

The callbacks of gq_triton.integrations train as docs/frameworks.md shows it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from framework_cases import (
    EPOCH,
    OPTIONS,
    Result,
    Tokens,
    Words,
    check_same,
    check_trained,
    clustered,
    gpt,
    network,
    samples,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from gq_triton import GQSGD, GradQueue
from gq_triton.dist import register

# --- Lightning


def check_lightning(rank: int, folder: str, devices: int = 2) -> None:
    steps = 2 * EPOCH * 2 // devices
    for options in (OPTIONS, clustered("net.0")):
        place = Path(folder, f"lightning{len(options)}")
        whole = lightning_run(place, None, devices, **options)
        check_trained(whole, network(), steps)
        first = place / f"epoch=0-step={steps // 2}.ckpt"
        resumed = lightning_run(None, first, devices, **options)
        check_trained(resumed, network(), steps)
        check_same(resumed, whole)


def lightning_run(
    folder: Path | None,
    path: Path | None,
    devices: int,
    passes: int = 1,
    optimizer: Any = torch.optim.SGD,
    **options: Any,
) -> Result:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers.logger import DummyLogger

    from gq_triton.integrations.lightning import GradQueueCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            # Lightning's users call either.
            return (self if folder is None else self.net)(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters(), lr=0.1, momentum=0.9)

    class Log(DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[set[str]] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.seen.append(set(metrics))

    callback, log = GradQueueCallback(**options), Log()
    callbacks: list[Any] = [callback]
    if folder is not None:
        callbacks.append(ModelCheckpoint(dirpath=folder, save_top_k=-1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        callbacks=callbacks,
        accumulate_grad_batches=passes,
        log_every_n_steps=2,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=log,
    )
    module = Module()
    trainer.fit(module, DataLoader(samples(), batch_size=4), ckpt_path=path, weights_only=True)
    logged = [names for names in log.seen if "grad_queue/mean_weight" in names]
    steps = trainer.global_step // (2 if path else 1)  # a resumed run does the second half
    assert len(logged) in (steps // 2, (steps + 1) // 2)
    assert ("grad_queue/largest_cluster" in logged[0]) == ("n_clusters" in options)
    return module.net, callback.queue


def check_losses(rank: int) -> None:
    """``loss_window`` is fed by the callback as a loop of one's own feeds it."""
    options: dict[str, Any] = OPTIONS | {"loss_window": 2}
    model, state = lightning_run(None, None, devices=2, **options)
    net = network()
    ddp = DistributedDataParallel(net)
    expected = register(ddp, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    sampler: DistributedSampler[Any] = DistributedSampler(samples())  # as Lightning adds it
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (batch,) in DataLoader(samples(), batch_size=4, sampler=sampler):
            optimizer.zero_grad()
            loss = ddp(batch).square().mean()
            expected.record_loss(loss)
            loss.backward()
            optimizer.step()
    assert torch.equal(state.state_dict()["losses"], expected.state_dict()["losses"])
    assert all(map(torch.equal, model.parameters(), net.parameters()))


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


def check_accelerate(rank: int, folder: str, devices: int = 2) -> None:
    for options in (OPTIONS, clustered("0")):
        path = Path(folder, f"accelerate{len(options)}")
        whole = accelerate_run(path, resume=False, **options)
        check_trained(whole, network(), 2 * EPOCH * 2 // devices)
        resumed = accelerate_run(path, resume=True, **options)
        check_trained(resumed, network(), 2 * EPOCH * 2 // devices)
        check_same(resumed, whole)


def accelerate_run(path: Path, resume: bool, passes: int = 1, **options: Any) -> Result:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import GeneralTracker

    from gq_triton.integrations.accelerate import attach, log

    class Log(GeneralTracker):
        name = "log"
        requires_logging_directory = False
        seen: list[set[str]]

        def __init__(self) -> None:
            super().__init__()
            self.seen = []

        @property
        def tracker(self) -> Any:
            return self

        def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
            self.seen.append(set(values))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

    AcceleratorState._reset_state()  # an Accelerator shares the settings of the one before
    GradientState._reset_state()
    tracker = Log()
    accelerator = Accelerator(gradient_accumulation_steps=passes, log_with=[tracker])
    accelerator.init_trackers("test")
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(samples(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    queue = attach(accelerator, model, optimizer, **options)
    if resume:
        accelerator.load_state(str(path))
    for epoch in range(int(resume), 2):
        for (batch,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        if epoch == 0:
            accelerator.save_state(str(path))
        log(accelerator, queue, step=epoch)
    if accelerator.is_main_process:
        assert len(tracker.seen) == 2 - int(resume)
        assert "grad_queue/norm_ratio" in tracker.seen[0]
    return net, queue


# --- Transformers


def check_transformers(rank: int, folder: str, devices: int = 2) -> None:
    steps = 2 * EPOCH * 2 // devices
    for kind, options in ((gpt, OPTIONS), (Words, clustered("body"))):
        path = Path(folder, f"transformers{len(options)}")
        whole = trainer_run(kind(), path, resume=False, **options)
        check_trained(whole, kind(), steps)
        for checkpoint in path.glob(f"checkpoint-{steps}") if rank == 0 else ():
            checkpoint.rename(path / "finished")  # so that the newest is the first epoch's
        if devices > 1:
            dist.barrier()
        resumed = trainer_run(kind(), path, resume=True, **options)
        check_trained(resumed, kind(), steps)
        check_same(resumed, whole)


def trainer_run(
    model: nn.Module, path: Path, resume: bool | str, passes: int = 1, **options: Any
) -> Result:
    from transformers import Trainer, TrainingArguments

    from gq_triton.integrations.transformers import GradQueueCallback

    callback = GradQueueCallback(**options)
    args = TrainingArguments(
        output_dir=str(path),
        use_cpu=True,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=passes,
        save_strategy="epoch",
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    ours = [entry["step"] for entry in history if "grad_queue/mean_weight" in entry]
    assert ours == [entry["step"] for entry in history if "loss" in entry]
    assert ours
    return model, callback.queue


# --- one device, or two


def alone(folder: str) -> None:
    """Train in a process that belongs to no group: the callbacks attach to the optimizer."""
    check_lightning(0, folder, devices=1)
    check_accelerate(0, folder, devices=1)
    check_transformers(0, folder, devices=1)
    check_accumulation(Path(folder, "passes"))
    check_refusals(Path(folder))
    # Of an optimizer of this package the callback logs the figures, and takes no options.
    _, optimizer = lightning_run(None, None, devices=1, optimizer=GQSGD)
    assert isinstance(optimizer, GQSGD)
    assert optimizer.metrics()["mean_weight"] != 1
    with pytest.raises(ValueError, match="GQSGD weights its gradients itself"):
        lightning_run(None, None, devices=1, optimizer=GQSGD, rho=2.0)


def check_accumulation(folder: Path) -> None:
    """The clusters take the number of accumulated batches from the framework."""
    runs: dict[str, tuple[Callable[..., Result], str]] = {
        "lightning": (
            lambda **options: lightning_run(folder / "a", None, devices=1, passes=2, **options),
            "net.0",
        ),
        "accelerate": (
            lambda **options: accelerate_run(folder / "b", resume=False, passes=2, **options),
            "0",
        ),
        "transformers": (
            lambda **options: trainer_run(Words(), folder / "c", False, passes=2, **options),
            "body",
        ),
    }
    expected = plain_run(passes=2, **clustered("0"))
    for name, (run, features) in runs.items():
        model, queue = run(**clustered(features))
        if name != "transformers":
            for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
                assert torch.equal(ours, theirs), name
        assert isinstance(queue, GradQueue), name
        assert queue._clusters is not None
        assert queue._clusters.options.accumulation_steps == 2, name
        assert {int(count) for count in queue.state_dict()["queued"].values()} == {2 * EPOCH}, name
        with pytest.raises(ValueError, match=r"accumulation_steps=3, but \w+ is 2: leave"):
            run(**clustered(features), accumulation_steps=3)


def plain_run(passes: int, **options: Any) -> nn.Module:
    """Return the network that a loop without a framework trains."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    GradQueue(net, accumulation_steps=passes, **options).attach(optimizer)
    for number, (batch,) in enumerate(2 * list(DataLoader(samples(), batch_size=4)), 1):
        (net(batch).square().mean() / passes).backward()
        if number % passes == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net


def check_refusals(folder: Path) -> None:
    """What cannot hold is refused in a sentence, before training."""
    from gq_triton.integrations.lightning import GradQueueCallback as Lightning
    from gq_triton.integrations.transformers import GradQueueCallback as Transformers

    for kind in (Lightning, Transformers):
        with pytest.raises(ValueError, match="rho must be"):
            kind(rho=0.5)
        with pytest.raises(ValueError, match=r"replaces loss.backward\(\)"):
            kind(mode="microbatch", n_clusters=2, features="net.0")
        with pytest.raises(TypeError, match="leave grad_scaler out"):
            kind(grad_scaler=None)  # pyright: ignore[reportCallIssue]
        with pytest.raises(RuntimeError, match="the queue exists from the beginning of"):
            _ = kind().queue
    with pytest.raises(ValueError, match="features must name a submodule"):
        Lightning(n_clusters=2, features="output_gradient")
    Lightning(n_clusters=2, labels=True)  # the loader brings them
    # A resumed Trainer finds its own queue, whole and unaltered, or stops.
    path = folder / f"transformers{len(OPTIONS)}"
    file = path / f"checkpoint-{4 * EPOCH}" / "grad_queue.pt"
    whole = file.read_bytes()
    saved = torch.load(file, weights_only=True)
    torch.save(saved | {"run": "another"}, file)
    with pytest.raises(ValueError, match="run must be"):
        trainer_run(gpt(), path, True, **OPTIONS)
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged: resume from an earlier"):
        trainer_run(gpt(), path, True, **OPTIONS)
    # A folder that was moved out of output_dir is named twice.
    moved = shutil.move(path / f"checkpoint-{2 * EPOCH}", folder / "moved")
    _, queue = trainer_run(gpt(), folder / "other", str(moved), **OPTIONS, resume_from=moved)
    assert {int(count) for count in queue.state_dict()["queued"].values()} == {4 * EPOCH}
    file.unlink()
    with pytest.raises(ValueError, match="give the folder that resume_from_checkpoint names"):
        trainer_run(gpt(), path, True, **OPTIONS)


def two_ranks(rank: int, folder: str) -> None:
    check_lightning(rank, folder)
    check_losses(rank)
    check_fabric(rank, folder)
    check_accelerate(rank, folder)
    check_transformers(rank, folder)
