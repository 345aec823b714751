"""What fits where: the largest batch of each device and plan, its time and its price."""
