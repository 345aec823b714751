"""One training step under fake tensors, recorded as plain data."""
