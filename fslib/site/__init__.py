"""The site: what the repository holds, as pages."""
