"""Requests in, tokens out, on one replica.

Read it in this order: request, block_pool, block_pool_base, scheduler, scheduler_base, batch,
runner, sampler, engine, llm. The first six are pure bookkeeping and import no PyTorch; the fleet
simulator shares them.
"""
