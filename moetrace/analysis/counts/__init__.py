"""What was chosen of a recording: its rows, counts and texts; and whether two recordings agree."""
