"""The study of low-bit training: this package and the tools that can be installed, from the same float networks."""
