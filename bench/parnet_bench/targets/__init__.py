"""What is measured: networks, ONNX files and bundles, and the rows they become."""
