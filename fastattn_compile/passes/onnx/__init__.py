"""ONNX graphs through the same eyes as FX graphs: shapes, the normalised view, the rewrite."""
