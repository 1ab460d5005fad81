"""``attn_implementation="fastattn"`` in transformers: masks as structure, routes per attention module, decoding state."""
