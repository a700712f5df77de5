"""Keys that are not just those a decoder layer makes of its own positions and stores."""
