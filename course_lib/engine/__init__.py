"""Requests in, tokens out, on one replica.

Read it in this order: request, block_pool, scheduler, batch, runner, sampler, engine, llm.
The first four are pure bookkeeping and import no PyTorch; the fleet simulator shares them.
"""
