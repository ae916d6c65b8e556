"""All settings of all commands, typed, checked, and as YAML files."""
