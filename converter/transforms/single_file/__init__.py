"""Single files that hold a pipeline, in the layout of its own trainer, as the parts of a Diffusers pipeline."""
