"""What keeps a model right after it was evaluated, run by run."""
