"""Pictures of what a config does."""
