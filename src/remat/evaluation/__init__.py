"""Training under several plans side by side: quality, time and memory."""
