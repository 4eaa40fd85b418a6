"""ONNX graphs: reading, shapes, types, cost and running them."""
