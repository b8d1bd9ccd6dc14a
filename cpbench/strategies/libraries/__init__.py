"""Other libraries' context parallelism as strategies, over the operator under test."""
