"""Workers of a run: processes on this machine (driver.py, processes.py) or on a Ray cluster (cluster.py).

worker.py is the worker itself, messages.py what it and the driver send each other.
"""
