"""Two versions measured in turn until it is decided whether the new one is slower."""
