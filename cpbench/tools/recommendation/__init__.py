"""``cpbench recommend``: the strategies that are fastest for a problem on a cluster, predicted."""
