"""What a program tells without running."""
