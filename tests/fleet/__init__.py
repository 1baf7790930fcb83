"""The fleet: its protocol as a model, its parts, and whole fleets in virtual time."""
