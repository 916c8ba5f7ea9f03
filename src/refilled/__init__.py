"""refilled: distil a strong vision model trained on other classes into a small model for your own."""
