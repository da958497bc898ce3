"""Data and models that the training script and the studies share, by name."""

from gq_triton.tasks.digits import load_digits
from gq_triton.tasks.task import Task, batches

__all__ = ["TASKS", "Task", "batches"]

TASKS = {"digits": load_digits}
