"""The report's page in a browser: how fast, and its pictures."""
