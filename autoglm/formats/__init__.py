"""Model file formats: GGUF containers and their quantized block types."""
