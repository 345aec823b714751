"""Integrations: plans inside the loops of Transformers' Trainer, Lightning and Accelerate.

Each module imports its library, so that none is needed but the one that is used.
"""
