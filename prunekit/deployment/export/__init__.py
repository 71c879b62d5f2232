"""ONNX, OpenVINO and pt2 files, quantization, and the comparison of a file with its model."""
