"""What a state holds of its text: as data, as a file that shows it, and as the page of the server."""
