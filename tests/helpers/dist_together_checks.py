"""The checks of what a rank says that waits for the others; see test_dist_together.py."""

import logging
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from dist_hooked import hooked, train
from dist_models import mlp

from gq_triton.dist import together as waits


def check_a_rank_that_waits_says_in_which_call(rank: int) -> None:
    ddp, state = hooked(mlp(), {"shard_queue": True})
    train(ddp, None, range(2))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("gq_triton")
    logger.addHandler(handler)
    patience, waits.PATIENCE = waits.PATIENCE, 0.2
    try:
        for call in (state.metrics, state.digest, state.state_dict):
            said.clear()
            dist.barrier()
            if rank == 1:
                time.sleep(1.0)
            call()
            if rank == 0:
                assert said[0].startswith(
                    f"rank 0 has waited 0.2 s in GradQueueState.{call.__name__}"
                )
                assert "every rank must call it" in said[0]
    finally:
        waits.PATIENCE = patience
        logger.removeHandler(handler)


def check_the_group_s_timeout_names_the_call(rank: int) -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=3))
    ddp, state = hooked(mlp(), {"shard_queue": True}, process_group=group)
    train(ddp, None, range(2))
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"GradQueueState\.metrics\(\) failed on rank 0; it"):
            state.metrics()
    dist.barrier()


CHECKS = [check_a_rank_that_waits_says_in_which_call, check_the_group_s_timeout_names_the_call]
