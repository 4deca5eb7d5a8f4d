"""From checkpoint to checkpoint: other names, other dtypes, other parts."""
