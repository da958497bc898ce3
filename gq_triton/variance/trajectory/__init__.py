"""The command ``gq-triton variance``: the variance of gradient estimators along a training."""
