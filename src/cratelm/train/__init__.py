"""Training: one flat loop on Accelerate, fed from token shards by step number alone.

`config` the recipes, `data` which sequences a step reads, `optimizers` who updates what, `loop` the
loop, `checkpoints` exact resume, `log` curves.
"""
