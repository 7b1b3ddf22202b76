"""Several processes: collectives, sharding, preemption."""
