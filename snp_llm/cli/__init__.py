"""The command line, a file a command. The top floor: it may import everything."""
