"""warmstate."""
