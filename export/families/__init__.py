"""Model families: the modules that are exported as graphs."""
