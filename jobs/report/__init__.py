"""The report card: what a preset does on a checkpoint, of pictures that are drawn unedited and edited in pairs."""
