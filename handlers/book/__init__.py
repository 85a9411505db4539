"""Books in files: import of chapters and rows, export of a project's rows."""
