"""When, where and to which rows edits are applied while the host samples."""
