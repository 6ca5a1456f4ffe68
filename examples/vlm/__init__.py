"""Parts of the example that fine-tunes a video language model."""
