"""Names, tables, files and settings: nothing that knows of attention."""
