"""Pure meaning: definitions, states, the shapes of the API. No I/O."""
