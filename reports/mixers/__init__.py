"""Reports of sequence mixers: beside attention, on several ranks, and in stacks with attention."""
