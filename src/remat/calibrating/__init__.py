"""Calibrate a device: measure its speeds, check them on steps apart, and learn from past runs."""
