"""Images to train on: where they come from, how they are read, and the views drawn of them."""
