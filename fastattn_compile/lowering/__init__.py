"""A chosen operator brought to a target."""
