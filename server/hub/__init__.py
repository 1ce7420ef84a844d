"""What all front ends of a server share: engines, places in their queues, limits, figures, and the server's life."""
