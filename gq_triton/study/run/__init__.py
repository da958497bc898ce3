"""The execution of a study's trials: processes, ranks, devices, records on disk."""
