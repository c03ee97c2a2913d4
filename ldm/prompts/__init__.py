"""How people write prompts: weights in brackets, breaks, and windows of a text tower."""
