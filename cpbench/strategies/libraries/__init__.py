"""Context parallelism of other libraries as strategies, over the operator under test."""
