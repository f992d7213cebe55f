"""RETRO, RETROfit, and sampling from both."""
