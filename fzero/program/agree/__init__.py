"""What ranks have to have in common to run a program together."""
