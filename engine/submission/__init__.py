"""Submission files of ImageCLEFmedical Caption: written and checked."""
