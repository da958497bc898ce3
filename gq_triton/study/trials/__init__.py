"""One trial of a study: a training run and its record."""
