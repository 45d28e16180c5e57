"""The version of this library, as profiles and checkpoints record it."""

VERSION = "0.1.0"
