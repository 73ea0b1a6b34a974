"""What one thing about a token tells about its experts."""
