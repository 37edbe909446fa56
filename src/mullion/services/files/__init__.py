"""Files inside the disks of partitions, running or not, without an agent and without a mount."""
