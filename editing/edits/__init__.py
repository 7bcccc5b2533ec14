"""What an edit is: data that a MODEL carries until it is sampled."""
