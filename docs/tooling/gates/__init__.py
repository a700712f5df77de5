"""Pages about the gates."""
