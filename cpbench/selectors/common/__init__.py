"""What selectors share: the operator around them, selections, pooling, ranking."""
