"""The tools: the public functions, the workflows, the command line."""
