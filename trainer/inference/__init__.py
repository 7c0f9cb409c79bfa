"""A trained model in use: files, HTTP, export, explanations."""
