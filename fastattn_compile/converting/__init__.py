"""``fa.convert``: an ONNX file in, an ONNX file with sub-quadratic attention out, and what that cost."""
