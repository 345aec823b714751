"""How a trained model serves: latency, memory, exported and quantized forms, updates beside it."""
