"""Learning the artefacts that edits need, through the host's MODEL."""
