"""The command line: one module for each kind of command; nothing here imports torch."""
