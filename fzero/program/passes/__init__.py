"""Passes over a traced program: each a pure function from a trace to a trace, in a file of its own."""
