"""The strategy ``sparse_fetch``: keys and values are sent to the ranks that have selected them."""
