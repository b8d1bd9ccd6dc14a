"""Results of runs: records, and the run directories that hold them."""
