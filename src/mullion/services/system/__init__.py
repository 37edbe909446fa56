"""The service itself: its status."""
