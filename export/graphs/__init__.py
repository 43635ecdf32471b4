"""A model as the graphs of a bundle: the modules, ONNX files, int8."""
