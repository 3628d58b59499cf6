"""What commands are made of: parsing, exit status, ranks."""
