"""Seconds and workspace bytes of each op: from a device table, or measured."""
