"""Each command as a function: select, transform, plan, run."""
