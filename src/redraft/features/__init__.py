"""What the target computes of its responses, kept for every epoch and every method."""
