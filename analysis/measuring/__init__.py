"""What commands share that runs a model."""
