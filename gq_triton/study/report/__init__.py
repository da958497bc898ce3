"""The report of a study: tables, intervals, verdicts, pictures, one page."""
