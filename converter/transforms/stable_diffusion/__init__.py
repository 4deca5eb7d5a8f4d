"""Stable Diffusion in a single file, in the layout of its own trainer, as the parts of a Diffusers pipeline."""
