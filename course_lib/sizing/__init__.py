"""Arithmetic before you buy: will it fit, how fast can it be at best, what does it cost.

Read it in this order: batching, catalog, memory, parallelism, roofline, mig, cost; `report` puts
them together for `course size`. All of it is plain Python without PyTorch and needs no GPU, and
each formula names its source. Sizes are decimal: 1 GB is 1e9 bytes.
"""
