"""What a person calls: ``gq-triton``, and what all commands share."""
