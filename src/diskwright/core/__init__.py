"""The block layer's core. It knows no format and no protocol by name."""
