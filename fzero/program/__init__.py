"""Programs: a traced step as one graph, its passes, and how it runs."""
