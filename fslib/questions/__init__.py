"""The questions, one module per notebook: its tables, its plots, its sentences, from records alone."""
