"""``python -m cpbench``: the command line."""

from cpbench.cli.main import main

main()
