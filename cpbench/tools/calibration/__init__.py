"""``cpbench calibrate``: a cluster file from measurements."""
