"""What to keep and what to recompute: options, timeline, solver, plans. Imports no torch."""
