"""A slice per operator's noun, each with its controller, its routes and its own mechanism."""
