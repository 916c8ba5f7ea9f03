"""Parameters chosen on held-out images."""
