"""What gates know, as tests on numbers."""
