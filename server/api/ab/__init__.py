"""A/B: comparisons, shadow traffic and what is known of the differences between variants."""
