"""What a replacement cost: metrics, controls, documents, tables."""
