"""Safety presets: the document, its texts, and the way to edits and back."""
