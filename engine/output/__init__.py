"""Files the engine writes; each appears whole or not at all."""
