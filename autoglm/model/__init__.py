"""What the network computes: GGUF tensors to native programs."""
