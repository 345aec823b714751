"""What really happens: simulated and measured peaks, and parity with the unplanned model."""
