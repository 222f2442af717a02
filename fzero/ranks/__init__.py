"""Processes: the mesh over them, its axes and collectives, and what they agree on."""
