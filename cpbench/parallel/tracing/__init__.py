"""What a strategy sends and holds, found by running its code on tensors without data."""
