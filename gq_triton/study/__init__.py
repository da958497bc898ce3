"""Large-batch scaling studies: equal tuning budgets, controls, paired intervals, one report.

The commands are ``gq-triton study run``, ``report`` and ``fetch`` (``command``). A study is a
folder: ``study.toml`` and one file per finished trial. Each package imports only those before it:

``design``
    What is compared: options, arms, controls, the settings that are tried, and the order in which
    trials follow from the results of earlier ones.
``trials``
    One training run: optimizers, gradients, scores.
``run``
    Many trials: worker processes, ranks, devices, records on disk, the view in the terminal.
``report``
    What the records say: tables, intervals, verdicts, pictures, the page.
"""
