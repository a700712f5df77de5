"""Methods for videos: they look for what repeats from frame to frame."""
