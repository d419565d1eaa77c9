"""The questions, one module per notebook: its tables, plots and sentences, from records."""
