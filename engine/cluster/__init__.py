"""A run on many machines: session.py reaches a Ray cluster, source.py hands out images and takes captions in, worker.py
captions on each of them, stream.py keeps its slots full from one block of images to the next, messages.py is what they
say to each other.
"""
