"""How the embedded demo model was made, and how well it answers; see README.md."""
