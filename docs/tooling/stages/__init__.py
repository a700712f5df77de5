"""Pages about the stage finding."""
