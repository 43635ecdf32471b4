"""What workers of a run have in common, on a cluster or beside this process: messages.py is what they and the driver
say to each other, stream.py keeps their slots full.
"""
