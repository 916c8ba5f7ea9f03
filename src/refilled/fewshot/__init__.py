"""Few-shot learning: classifiers of a few images, learned anew for each of many tasks, and their accuracy."""
