"""What all packages have in common: the version, which an installed package's metadata are made of (pyproject.toml)."""

__version__ = "0.1.0"
