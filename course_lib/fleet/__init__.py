"""Many replicas: when to start one, when to stop one, and what it takes until a new one serves."""
