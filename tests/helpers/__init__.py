"""What several test modules share: networks, plans, data, and processes to run them in."""
