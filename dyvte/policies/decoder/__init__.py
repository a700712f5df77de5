"""Methods that rank, prune or merge visual tokens inside the decoder, one a file."""
