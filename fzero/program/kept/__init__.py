"""The programs that a jitted function keeps, and which of them serves a call."""
