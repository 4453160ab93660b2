"""Plain torch: objectives without an N x M matrix of logits, which need no kernel; one file each."""
