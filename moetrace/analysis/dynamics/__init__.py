"""Routing from token to token."""
