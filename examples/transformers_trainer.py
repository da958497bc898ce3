# The Transformers Trainer with the callback; under torchrun with DDP.

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from gq_triton.integrations.transformers import GradQueueCallback

tokens = torch.randint(0, 256, (128, 32))
data = [{"input_ids": row, "labels": row} for row in tokens]
small = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(vocab_size=256, bos_token_id=0, eos_token_id=0, **small))
callback = GradQueueCallback(n_clusters=2, features="transformer.h.0")  # or without clusters
args = TrainingArguments(
    output_dir="runs/trainer",
    use_cpu=True,  # leave it out on GPUs
    num_train_epochs=2,
    per_device_train_batch_size=8,
    logging_steps=4,  # grad_queue/mean_weight and so on are logged with the loss
    save_strategy="epoch",
    report_to=[],
)
trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[callback])
trainer.train()  # resume_from_checkpoint=True continues, queue and all
print(callback.queue.metrics()["mean_weight"])
