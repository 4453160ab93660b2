"""Who computes: one file per backend, one registry, and the choice between them."""
