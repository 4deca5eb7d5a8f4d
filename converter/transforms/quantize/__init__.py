"""Quantized forms of weights, a scheme a file."""
