"""Write the ONNX graphs of a bundle: torch modules, export to ONNX files, and int8 quantisation."""
