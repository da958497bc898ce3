"""Data and models that the training script and the studies share, by name."""

from gq_triton.tasks import data_files, lines, random_features, rare_digits, text
from gq_triton.tasks.digits import load_digits
from gq_triton.tasks.images import IMAGE_TASKS
from gq_triton.tasks.own import OwnTask, own_task
from gq_triton.tasks.scored import MissingData, ScoredTask, StudyTask, measure, sample_losses
from gq_triton.tasks.task import Task, batch_stream, batches

__all__ = [
    "STUDY_TASKS",
    "TASKS",
    "MissingData",
    "OwnTask",
    "ScoredTask",
    "StudyTask",
    "Task",
    "batch_stream",
    "batches",
    "measure",
    "sample_losses",
    "study_task",
]

TASKS = {"digits": load_digits}
"""What launch/train.py trains on."""

STUDY_TASKS: dict[str, StudyTask] = {
    "lines-disc": StudyTask(
        lines.load_disc,
        "vertical (5) against horizontal (95) lines, 21 parameters (section 3.2 of the paper)",
        score="balanced_accuracy",
        chance=0.5,
        target=0.95,
    ),
    "lines-detect": StudyTask(
        lines.load_detect,
        "lines (95 horizontal, 5 vertical) against 100 images of noise, 21 parameters",
        score="worst_group_accuracy",
        chance=0.0,
        target=0.95,
    ),
    "digits": StudyTask(
        rare_digits.load_plain,
        "1167 real handwritten digits, small convolutional net",
        score="accuracy",
        chance=0.1,
        target=0.95,
    ),
    "digits-longtail": StudyTask(
        rare_digits.load_longtail,
        "the digits with 6 samples left of 3 classes, 64-64-10 net",
        score="balanced_accuracy",
        chance=0.1,
        target=0.8,
    ),
    "digits-bursts": StudyTask(
        rare_digits.load_bursts,
        "the digits with 3 classes that come in every 20th batch only, 64-64-10 net",
        score="balanced_accuracy",
        chance=0.1,
        target=0.8,
    ),
    "digits-hidden": StudyTask(
        rare_digits.load_hidden,
        "the digits with 5 % of every class mirrored and inverted, 64-64-10 net",
        score="worst_group_accuracy",
        chance=0.1,
        target=0.6,
    ),
    "python-lm": StudyTask(
        text.load_python_lm,
        "next byte of the standard library's source, 2-layer transformer of width 64",
        score="bits_per_byte",
        chance=8.0,
        target=3.0,
        higher=False,
        labels=False,
    ),
    "python-lm-deep": StudyTask(
        text.load_python_lm_deep,
        "the same with all of the library's source and 6 layers",
        score="bits_per_byte",
        chance=8.0,
        target=2.5,
        higher=False,
        labels=False,
    ),
    "random-features": StudyTask(
        random_features.load_random_features,
        "a random teacher, 500 samples; the last layer over 1000 fixed features learns",
        score="accuracy",
        chance=0.5,
        target=0.7,
    ),
    **IMAGE_TASKS,
    "reuters": StudyTask(
        data_files.load_reuters,
        "Reuters-21578, 8 topics, from the files that --data names, 2000-64-8 net",
        score="balanced_accuracy",
        chance=0.125,
        target=0.8,
    ),
}
"""What a study can run; ``--help`` lists them."""


def study_task(name: str) -> StudyTask:
    """Return the entry of a task.

    Args:
        name: a key of ``STUDY_TASKS``, or ``"module:function"`` of one's own, see ``OwnTask``.
    """
    return own_task(name) if ":" in name else STUDY_TASKS[name]
