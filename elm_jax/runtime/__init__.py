"""What the program runs on: device mesh and sharding rules, checkpoints, processes, telemetry."""
