"""One training run: the loop, rewards, evaluation and the files of the run directory."""
