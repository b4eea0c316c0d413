"""Tables over runs: records, comparisons of seeds, statistics, verdicts."""
