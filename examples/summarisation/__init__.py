"""Summaries of videos by a frozen encoder-decoder: How2's files, ROUGE, and an embedded task."""
