"""The process of one rank: rendezvous, then check, measure and record each case."""
