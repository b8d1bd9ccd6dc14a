"""One run against another: statistics, verdicts, the gate for CI."""
