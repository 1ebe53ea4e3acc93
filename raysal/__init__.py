"""raysal turns a mission's archive of rover images and about 3% of hand labels into masks for every image."""

__version__ = "0.1.0"
