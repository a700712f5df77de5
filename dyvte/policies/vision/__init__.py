"""Methods that look at the vision tower, or at its tokens alone, and act before the decoder."""
