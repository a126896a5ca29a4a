"""Incidents: fleets that were made to fail in a known way, and what an operator sees of it.

`records` says what a record holds. `conditions` makes the trouble, `real` has it happen to the
engine itself and `simulated` to the simulator, `bank` keeps what was recorded. `__main__` records
anew.
"""
