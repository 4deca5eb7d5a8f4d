"""What ``torch.save`` writes: archives, streams of pickles, and the state dict in them. No pickle is run."""
