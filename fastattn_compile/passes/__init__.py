"""Graph in, graph out: view, find, mask structure, choose, rewrite."""
