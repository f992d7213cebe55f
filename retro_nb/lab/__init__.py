"""What runs notebooks and commands."""
