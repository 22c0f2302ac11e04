"""Training: one flat loop on Accelerate, fed from token shards by step number alone.

`config` has the recipes, `data` selects the sequences of each step, `optimizers` assigns tensors to
optimizers, `loop` is the loop, `checkpoints` resumes exactly, and `log` writes the curves.
"""
