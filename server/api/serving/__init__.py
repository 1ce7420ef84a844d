"""The variants, which one is meant, and whether it has room."""
