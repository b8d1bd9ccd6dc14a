"""The command line, one module per group of commands.  It imports no torch."""
