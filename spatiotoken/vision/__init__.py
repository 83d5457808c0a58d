"""The vision tower made cheaper."""
