"""Write an HTML page for a run. build.py is the entry point; assets/ holds the code that runs in the browser."""
