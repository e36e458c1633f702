"""Real weights and real text for the demonstration, from installed packages instead of a hub."""
