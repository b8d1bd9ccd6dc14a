"""Work beside kernels: what torch would launch for the operations of a strategy."""
