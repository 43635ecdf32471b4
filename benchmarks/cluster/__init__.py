"""Ray: what it costs, and a simulation of large clusters."""
