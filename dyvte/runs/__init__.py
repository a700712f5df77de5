"""How commands run: configurations, run folders, batches and processes."""
