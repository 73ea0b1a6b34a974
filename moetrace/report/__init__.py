"""What people look at: findings as text, files and pages."""
