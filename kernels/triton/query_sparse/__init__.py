"""Operator `triton_query_sparse`: selections of single queries in Triton."""
