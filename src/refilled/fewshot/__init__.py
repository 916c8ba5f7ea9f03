"""Few-shot learning: classifiers learned from a few images for each of many tasks, and their accuracy."""
