"""The command line, ``fastattn``: one file a verb."""
