"""Runs that were recorded: where they lie, how they are listed and read."""
