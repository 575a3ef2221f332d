"""Moving artifacts: push, pull, true subsets, merge, and the dataset card."""
