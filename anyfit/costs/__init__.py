"""What a config takes besides bytes, measured."""
