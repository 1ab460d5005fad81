"""Learned parameters of operators as parameters of the model."""
