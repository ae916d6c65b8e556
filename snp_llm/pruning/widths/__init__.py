"""How many units each site keeps."""
