"""From a text to an adapter. Knows nothing of the command line."""
