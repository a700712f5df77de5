"""What a forward pass costs: operations, time and memory."""
