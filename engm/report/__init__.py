"""Tables over runs: records, comparisons of seeds, statistics, verdicts."""

from engm.report.run_report import frame
