"""How many groups each layer keeps."""
