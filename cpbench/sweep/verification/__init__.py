"""What ``cpbench verify`` runs: cases, and their tables for mixers and for selectors."""
