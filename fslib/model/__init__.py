"""The model: an encoder whose heads can be reached, and a classifier per task."""
