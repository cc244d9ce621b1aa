"""The command line: arguments, commands, and the demo."""
