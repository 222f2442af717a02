"""What a graph is: how it is traced, what its nodes are and which memory they share."""
