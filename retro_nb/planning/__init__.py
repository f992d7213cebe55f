"""Estimates of time, memory and operations."""
