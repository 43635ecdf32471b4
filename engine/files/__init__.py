"""Writing files safely: atomic writes, locks and the private cache folder."""
