"""What the examples share: reading data folders, writing results, real images and a text encoder, training."""
