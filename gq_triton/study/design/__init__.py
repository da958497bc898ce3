"""The design of a study: options, arms, controls, settings that are tried, and their order."""
