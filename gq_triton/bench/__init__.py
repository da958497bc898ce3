"""``gq-triton bench``, and the one harness of all benchmarks: ``harness``, ``run``, ``record``."""
