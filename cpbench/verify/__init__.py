"""The check of every result against float64, at a small size and at the measured one."""
