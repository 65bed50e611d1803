"""The ``sagas`` command: what it takes, reads and does, and how it says that."""
