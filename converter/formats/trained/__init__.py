"""Checkpoints that distributed training wrote: many files, which make weights only together, and their pieces."""
