"""One module per op, each with its `CASES`."""
