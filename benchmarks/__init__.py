"""Benchmarks: published shapes, and what planning reaches on them."""
