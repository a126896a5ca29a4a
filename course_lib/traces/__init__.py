"""Requests as they came in production or could have come: who asks when, for how much.

`trace` says what a request of a trace is, `readers` reads the published formats, `generators` makes
traces up. The load client replays them against a server, the fleet simulator against a fleet.
"""
