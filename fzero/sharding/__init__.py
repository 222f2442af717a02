"""Where each leaf of a tree lives, and arithmetic on the pieces."""
