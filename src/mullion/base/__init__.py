"""The ground floor: units, errors, settings, the door to subprocess, the block vocabulary. Imports nothing above."""
