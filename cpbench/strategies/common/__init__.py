"""Shared by strategies: ring rotation, all-to-all of heads, collectives, return of results."""
