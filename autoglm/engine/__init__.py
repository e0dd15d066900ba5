"""What runs when: scheduling, KV blocks, sampling, one step at a time."""
