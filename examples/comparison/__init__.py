"""READ and its peers compared under one protocol."""
