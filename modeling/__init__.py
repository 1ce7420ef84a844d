"""What a linear-attention checkpoint is and how it computes: specs, families, layers, ops, state, loading."""
