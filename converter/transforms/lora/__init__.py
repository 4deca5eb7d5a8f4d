"""LoRA adapters under the names of PEFT, Diffusers and kohya: which module of which model each pair is of."""
