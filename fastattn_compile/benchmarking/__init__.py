"""How fast operators are on this machine, against the best exact attention there and against the physical limit."""
