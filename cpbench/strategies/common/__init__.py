"""What strategies share: rings, exchanges of tokens for heads, collectives."""
