"""A run on many machines: session.py reaches a Ray cluster, driver.py hands out images and takes captions in, worker.py
captions on each of them.
"""
