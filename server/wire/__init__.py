"""What the API process and an engine process share, and how the one reaches the other."""
