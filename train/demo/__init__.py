"""The demo checkpoint, trained from packaged MRI volumes. Start at build.py."""
