"""The command ``gq-triton plan``: memory and time of Grad Queue on many GPUs.

``formulas`` has the arithmetic, ``ways`` adds it up for each way to use the package, ``machine``
has the speeds. Nothing here trains: a model is built on the meta device.
"""
