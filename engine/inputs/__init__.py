"""Inputs: images, DICOM files, tables of ids and captions, local folders and folders at a URI."""
