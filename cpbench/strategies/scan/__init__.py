"""Context parallelism of sequence mixers: a scan of the states that runs of tokens hand on."""
