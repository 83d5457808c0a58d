"""Evaluation on video-QA datasets."""
