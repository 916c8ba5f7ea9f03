"""Which teacher, and at which size: candidates measured on a sample of the training images, before any training."""
