"""The process of one rank: rendezvous, then case by case: refuse, check, measure, record."""
