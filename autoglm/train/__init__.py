"""Train, compress and export AutoGLM-Phone models (extra `train`; the only folder that imports torch)."""
