"""Devices of ranks: timing, synchronisation, peak memory, cache flushing, flags."""
