"""How long a test waits: long enough for a machine that is busy, short enough to find a hang."""

LIMIT_S = 600  # for anything that takes seconds on an idle machine
