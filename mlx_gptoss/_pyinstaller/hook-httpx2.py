"""Leaves out what the command of httpx2 needs, and its library does not: 500 modules."""

excludedimports = ["pygments", "rich"]
