"""The ops as torch sees them: schemas and fakes, derivatives, and how the package calls them."""
