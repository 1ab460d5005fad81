"""What the operators are: one folder each, one interface."""
