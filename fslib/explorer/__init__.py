"""The head explorer: a widget, and the same as a page that needs no kernel."""
