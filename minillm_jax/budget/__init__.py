"""The number of groups that each layer keeps."""
