"""The commands that run no sweep: listing, traffic, links, compile, tune, doctor, status."""
