"""Reading checkpoints of the LLaVA code base and its forks."""
