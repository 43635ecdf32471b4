"""What goes in: images, DICOM files, tables of ids and captions, folders at a URI."""
