"""Running the trials of a study: processes, ranks, devices, records on disk."""
