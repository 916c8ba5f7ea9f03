"""The choice of a teacher and its size, and checks of the labels, before any training."""
