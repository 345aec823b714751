"""A plan put onto a model: checkpointed regions, and the handle that takes them off."""
