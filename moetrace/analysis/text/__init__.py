"""Texts with their routing, and which experts take which kinds of token."""
