"""The ground floor: units, errors, settings, logging, the door to subprocess, the block vocabulary. Imports nothing above."""
