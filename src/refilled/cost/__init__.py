"""How long will it take, and how much memory: estimates before anything starts."""
