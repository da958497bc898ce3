# PyTorch Lightning with the callback.

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from gq_triton.integrations.lightning import GradQueueCallback


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        )

    def training_step(self, batch, index):
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


data = TensorDataset(torch.randn(512, 64), torch.randint(10, (512,)))
callback = GradQueueCallback(n_clusters=4, features="net.1")  # or without clusters
trainer = lightning.Trainer(
    accelerator="cpu",  # and devices=2, strategy="ddp" for two ranks
    max_epochs=2,
    callbacks=[callback],
    logger=CSVLogger("runs"),  # or any other: grad_queue/mean_weight and so on arrive there
    log_every_n_steps=4,
    enable_progress_bar=False,
)
trainer.fit(Module(), DataLoader(data, batch_size=64))  # ckpt_path=... resumes, queue and all
print(callback.queue.metrics()["mean_weight"])
