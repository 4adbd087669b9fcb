"""The programs that people start, and their flags."""
