"""Everything that knows module names, config keys and how a decoder block is called."""
