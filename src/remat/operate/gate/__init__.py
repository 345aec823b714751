"""The gate: rules that a run must keep against a baseline, a verdict, and who promoted what."""
