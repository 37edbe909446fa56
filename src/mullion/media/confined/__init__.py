"""What runs shut in, and the walls: nothing else is imported there, so that it starts fast and holds little."""
