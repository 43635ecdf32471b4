"""What every benchmark stands on: the machine, workloads, pictures."""
