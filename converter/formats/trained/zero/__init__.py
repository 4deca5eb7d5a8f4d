"""Checkpoints of DeepSpeed's ZeRO, stages 1 to 3: the float32 weights that the optimizers of all ranks hold together.

``*_model_states.pt`` says what the parameters are called, their shapes and their order, and holds buffers and frozen
ones; each rank's ``*_optim_states.pt`` has its runs of all others, end to end. What is taken, under which names and in
which order, is what DeepSpeed's own script gives (``deepspeed/utils/zero_to_fp32.py``), with the frozen parameters that
it leaves out at stage 1. What ``ds_to_universal.py`` made of such a checkpoint has a file for each parameter instead.

Ranks of tensor, pipeline and expert parallelism hold other parts, and are refused.
"""
