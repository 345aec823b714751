"""The other programs that a traced step could run, with loss heads or blocks in slices."""
