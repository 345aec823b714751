"""Real training with each framework, with and without the callback."""
