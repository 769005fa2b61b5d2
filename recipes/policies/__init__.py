"""What writes an answer: the interface, and one file or folder for each policy."""
