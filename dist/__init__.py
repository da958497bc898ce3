"""Grad Queue under DistributedDataParallel, installed as `gq_triton.dist`."""
