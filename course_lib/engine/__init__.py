"""Requests in, tokens out, on one replica.

Read it in this order: request, block_pool, scheduler, scheduler_base, batch, runner, sampler,
engine, llm. The first five are pure bookkeeping and import no PyTorch; the fleet simulator shares
them.
"""
