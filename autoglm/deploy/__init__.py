"""Around the server: what the machine has, which model files are where, checks before the start."""
