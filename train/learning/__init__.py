"""One run of training: the loop, rewards, evaluation, and what is left in its directory."""
