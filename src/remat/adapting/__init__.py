"""Adapt: a plan for each shape of batch, chosen before the forward while training runs."""
