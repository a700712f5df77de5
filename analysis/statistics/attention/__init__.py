"""What the layers and heads look at, and what they write: numbers in, numbers out."""
