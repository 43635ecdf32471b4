"""A page to look at a run: build.py is the command top to bottom, assets/ what the browser runs."""
