"""Export to ONNX, OpenVINO and pt2, quantization, and the comparison of a file with its model."""
