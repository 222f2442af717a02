"""`nn.Module` as a function, and what its forward may do."""
