"""LoRAs merged into the weights of a model."""
