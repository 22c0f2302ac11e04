"""Training: one flat loop on Accelerate, fed from token shards by step number alone.

`config` the recipes, `data` which sequences a step reads, `optimizers` which optimizer updates which tensor, `loop`
the loop, `checkpoints` exact resume, `log` curves.
"""
