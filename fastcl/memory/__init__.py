"""What outlives a training step: queues of keys, and the slow copy of an encoder."""
