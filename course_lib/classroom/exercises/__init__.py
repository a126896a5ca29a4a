"""The exercises, a module a notebook: `EXERCISES` with an oracle, hints and points each."""
