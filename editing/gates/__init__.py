"""What decides whether an edit acts: discriminators and the gates that ask them."""
