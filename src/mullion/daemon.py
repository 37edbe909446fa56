"""The composition root of `mullion serve`: the one file that knows every floor."""
