"""Time of a strategy without a GPU: its own code is recorded on tensors without data, costed with
the constants of a cluster, and replayed."""
