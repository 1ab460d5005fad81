"""Sub-quadratic attention for any model, at compile time, with the accuracy it cost."""
