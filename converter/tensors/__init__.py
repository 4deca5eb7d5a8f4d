"""What a tensor is, how its bytes are read, and the numbers of casts."""
