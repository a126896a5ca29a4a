"""The engine behind HTTP: who gets in, how a replica starts and leaves, and how pools are split."""
