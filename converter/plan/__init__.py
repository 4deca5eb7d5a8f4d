"""What will be written, byte for byte, before a byte moves."""
