"""A bundle as one file for other runtimes, with the transform in the graph: ONNX, or a program of `torch.export`."""
