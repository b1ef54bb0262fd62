"""Other libraries' own signatures, one library a file, over the public names of ihvp."""
