"""The program ``gq-triton``, and what all commands share: whole files and refusals."""
